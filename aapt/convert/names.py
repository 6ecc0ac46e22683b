"""Names of a Wan transformer's tensors: Wan's own, as all other names are turned into."""

import re

# Segments that training frameworks put between a tensor's own, and prefixes before them
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")
PREFIX = re.compile(r"^(base_model\.model|model|module|generator|diffusion_model|transformer)\.")

# diffusers' names and Wan's
DIFFUSERS = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("proj_out.", "head.head."),
    (".attn1.to_out.0.", ".self_attn.o."),
    (".attn2.to_out.0.", ".cross_attn.o."),
    (".attn1.to_", ".self_attn."),
    (".attn2.to_", ".cross_attn."),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".ffn.net.0.proj.", ".ffn.0."),
    (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."),  # the only norm of a block with weights
)


def wan_name(name: str) -> str:
    """Return Wan's own name of a tensor, from diffusers' or from one that training has wrapped."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while PREFIX.match(name):
        name = PREFIX.sub("", name, count=1)
    for theirs, wans in DIFFUSERS:
        if name.startswith(theirs) or theirs.startswith("."):
            name = name.replace(theirs, wans, 1)
    if name == "scale_shift_table":
        return "head.modulation"
    return re.sub(r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation", name)
