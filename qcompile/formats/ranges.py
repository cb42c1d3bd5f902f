"""Formats whose scales follow from the range of a group at once: what a KV cache is written in, token by token."""

from __future__ import annotations

from ..errors import FormatError
from .algebra import affine, linear_gen
from .spec import FormatSpec, Plane


def why_no_range(spec: FormatSpec) -> str | None:
    """Why keys and values cannot be written in ``spec``; None if they can."""
    try:
        range_planes(spec)
    except FormatError as error:
        return str(error)
    return None


def range_planes(spec: FormatSpec) -> tuple[Plane, Plane | None]:
    """The planes of scale and of zero, if there is one, of a format that keys and values can be written in.

    Those are ``scale * gen(q)``, ``scale * (q - zero)`` with integer zero points and ``scale * gen(q) + zero``, scale a float
    for each row or group of it. Raises :class:`FormatError` for all others.
    """
    form, scales = affine(spec), {p.name: p for p in spec.scales}
    shared = [p.name for p in spec.scales if p.rows != 1]
    scale = scales.get(str(form.coeff))
    zeros = [p for p in spec.scales if p is not scale]
    fits = scale is not None and not scale.is_integer and not shared and not spec.columns and len(zeros) <= 1
    if fits and zeros:
        zero = zeros[0]
        names = {s.name: s for s in spec.value.free_symbols}
        wanted = -names[str(form.coeff)] * names[zero.name] if zero.is_integer else names[zero.name]
        fits = zero.per == scale.per and form.offset == wanted and linear_gen(spec) is not None  # type: ignore[union-attr]
    else:
        fits = fits and form.offset == 0
    if not fits or scale is None:
        raise FormatError(f"format {spec.name!r} cannot hold keys and values: value = {spec.value}. A cache is written token "
                          "by token, so scales must be floats that follow from one token's range: scale * gen(q), "
                          "scale * (q - zero) or scale * gen(q) + zero, as int8, fp8_e4m3 and int4_g32 are")  # fmt: skip
    return scale, (zeros[0] if zeros else None)
