"""A Llama-shaped decoder, trained here on text that ships with Python, then quantized by naming a backend.

The first run trains for three to four minutes on two cores and keeps the model; see training.py.
"""

import copy

import quiet  # noqa: F401  (before transformers)
import torch
from measure import parameter_bytes
from rich.console import Console
from rich.table import Table
from training import encode, figures, perplexity, trained_decoder
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

POLICIES = ["int8", "int4", "mixed"]
PROMPT = 'def read_lines(path):\n    """Return'
NEW_TOKENS = 40


def continuation(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """PROMPT and what the model finds likeliest after it, token by token."""
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    inputs = {name: prompt[name] for name in ("input_ids", "attention_mask")}
    end = tokenizer.eos_token_id
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=end)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@torch.inference_mode()
def main() -> None:
    """Print perplexity and bytes for each policy, and each model's continuation of one prompt."""
    model, tokenizer, held_out = trained_decoder()
    ids = encode(tokenizer, [held_out])
    table = Table(title=f"Llama-shaped decoder, {parameter_bytes(model) / 4e6:.1f} million weights")
    for heading in ("policy", "held-out perplexity", "MB", "of float"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    table.add_row("unigrams", f"{figures()['unigram_perplexity']:.1f}", "", "")
    continuations = {}
    whole = parameter_bytes(model)
    for policy in ["float", *POLICIES]:
        subject = copy.deepcopy(model)
        how = {} if policy == "float" else {"backend": "qcompile", "options": {"policy": policy}}
        value = perplexity(torch.compile(subject, **how), ids)
        size = parameter_bytes(subject)
        table.add_row(policy, f"{value:.2f}", f"{size / 1e6:.2f}", f"{size / whole:.2f}×")
        # The parameters themselves are quantized by now, so generation, which runs eagerly, uses them too.
        continuations[policy] = continuation(subject, tokenizer)
    console = Console()
    console.print(table)
    for policy, text in continuations.items():
        console.rule(policy, align="left")
        console.print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
