"""The Cholesky factor of an inverse, without the inverse and in the memory of the matrix itself.

GPTQ takes the upper U with UᵀU = H⁻¹ (Frantar et al. 2023, section 3.3, "Cholesky reformulation"). With J the reversal of rows
and columns and JHJ = LLᵀ, U = J L⁻¹ J: one factorization and one triangular inverse (K³ operations with the products as dense
ones), where factor, inverse and factor of it take 4/3 K³ and a second matrix. Both go by blocks, left-looking (Golub and Van
Loan, "Matrix Computations", section 4.2), so that nearly all is matrix products.
"""

from __future__ import annotations

import torch

BLOCK = 256
"""Columns of a block: what is made beside the matrix are panels of so many."""


def inverse_factor_(matrix: torch.Tensor) -> bool:
    """Overwrites a symmetric ``[K, K]``, of which the lower triangle is read, with L⁻¹, lower triangular, ``matrix`` = LLᵀ.

    False, and ``matrix`` spoilt, where it is not positive definite in its dtype.
    """
    starts = range(0, len(matrix), BLOCK)
    for start in starts:
        here, before = slice(start, start + BLOCK), slice(start)
        panel = matrix[start:, here]
        panel.addmm_(matrix[start:, before], matrix[here, before].t(), alpha=-1)
        corner, failed = torch.linalg.cholesky_ex(matrix[here, here])
        if failed:
            return False
        # With the corner inverted at once, the rest of the panel is one more product.
        one = torch.eye(len(corner), dtype=matrix.dtype, device=matrix.device)
        inverse = torch.linalg.solve_triangular(corner, one, upper=False)
        matrix[start + BLOCK :, here] = matrix[start + BLOCK :, here] @ inverse.t()
        matrix[here, here] = inverse
        matrix[here, start + BLOCK :] = 0.0
    for start in starts:
        here, before = slice(start, start + BLOCK), slice(start)
        # The rows above hold their part of L⁻¹ already.
        matrix[here, before] = matrix[here, here] @ (matrix[here, before] @ matrix[before, before]).neg_()
    return True
