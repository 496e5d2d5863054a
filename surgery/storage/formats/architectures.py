"""Names of modules in other programs, by architecture: rows of names there and here."""

from __future__ import annotations

from surgery.storage.formats.module_names import register_module_names
from surgery.storage.formats.table import ModuleNames, NameRow

__all__ = ["WORDS", "name_rows"]


def name_rows(pairs: str, start: str = "", own: str = "") -> tuple[NameRow, ...]:
    """Rows from lines "theirs  ours [ours …]", each after a start."""
    lines = (line.split() for line in pairs.splitlines() if line.strip())
    return tuple(NameRow(start + theirs, tuple(own + name for name in ours)) for theirs, *ours in lines)


# Flux: Black Forest Labs' names, and those of diffusers' FluxTransformer2DModel.
FLUX = (
    *name_rows(
        """
        img_attn.qkv     attn.to_q attn.to_k attn.to_v
        txt_attn.qkv     attn.add_q_proj attn.add_k_proj attn.add_v_proj
        img_attn.proj    attn.to_out.0
        txt_attn.proj    attn.to_add_out
        img_mlp.0        ff.net.0.proj
        img_mlp.2        ff.net.2
        txt_mlp.0        ff_context.net.0.proj
        txt_mlp.2        ff_context.net.2
        img_mod.lin      norm1.linear
        txt_mod.lin      norm1_context.linear
        img_attn.norm.query_norm attn.norm_q
        img_attn.norm.key_norm   attn.norm_k
        txt_attn.norm.query_norm attn.norm_added_q
        txt_attn.norm.key_norm   attn.norm_added_k
        """,
        "double_blocks.{n}.",
        "transformer_blocks.{n}.",
    ),
    NameRow(
        "single_blocks.{n}.linear1",
        tuple(
            f"single_transformer_blocks.{{n}}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ),
        (1, 1, 1, 4),
    ),
    *name_rows(
        """
        linear2         proj_out
        modulation.lin  norm.linear
        norm.query_norm attn.norm_q
        norm.key_norm   attn.norm_k
        """,
        "single_blocks.{n}.",
        "single_transformer_blocks.{n}.",
    ),
    *name_rows(
        """
        img_in                 x_embedder
        txt_in                 context_embedder
        time_in.in_layer       time_text_embed.timestep_embedder.linear_1
        time_in.out_layer      time_text_embed.timestep_embedder.linear_2
        vector_in.in_layer     time_text_embed.text_embedder.linear_1
        vector_in.out_layer    time_text_embed.text_embedder.linear_2
        guidance_in.in_layer   time_text_embed.guidance_embedder.linear_1
        guidance_in.out_layer  time_text_embed.guidance_embedder.linear_2
        final_layer.linear     proj_out
        """
    ),
    NameRow("final_layer.adaLN_modulation.1", ("norm_out.linear",), rows="swap_halves"),
)
_JOINT = r"^transformer_blocks\.\d+\.(attn\.add_|attn\.to_|ff\.|ff_context|norm1)"  # of Flux and of SD 3 alike
_FLUX_OWN = (r"^single_transformer_blocks\.\d", _JOINT)

register_module_names(
    ModuleNames(
        "flux",
        FLUX,
        marks=(r"(double|single)[._]blocks[._]\d",),
        own_marks=_FLUX_OWN,
        component="transformer",
        model_types=("FluxTransformer2DModel",),
    )
)

register_module_names(
    ModuleNames(
        "flux-xlabs",
        (
            *name_rows(
                """
                qkv_lora1   attn.to_q attn.to_k attn.to_v
                qkv_lora2   attn.add_q_proj attn.add_k_proj attn.add_v_proj
                proj_lora1  attn.to_out.0
                proj_lora2  attn.to_add_out
                """,
                "double_blocks.{n}.processor.",
                "transformer_blocks.{n}.",
            ),
            *name_rows(
                """
                qkv_lora   attn.to_q attn.to_k attn.to_v
                proj_lora  proj_out
                """,
                "single_blocks.{n}.processor.",
                "single_transformer_blocks.{n}.",
            ),
        ),
        marks=(r"(double|single)_blocks\.\d+\.processor\.",),
        own_marks=(r"(single_)?transformer_blocks\.\d",),
        component="transformer",
        model_types=("FluxTransformer2DModel",),
    )
)

# Stable Diffusion 3: Stability's MMDiT, and diffusers' SD3Transformer2DModel.
SD3 = (
    *name_rows(
        """
        x_block.attn.qkv        attn.to_q attn.to_k attn.to_v
        context_block.attn.qkv  attn.add_q_proj attn.add_k_proj attn.add_v_proj
        x_block.attn.proj       attn.to_out.0
        context_block.attn.proj attn.to_add_out
        x_block.attn2.qkv       attn2.to_q attn2.to_k attn2.to_v
        x_block.attn2.proj      attn2.to_out.0
        x_block.mlp.fc1         ff.net.0.proj
        x_block.mlp.fc2         ff.net.2
        context_block.mlp.fc1   ff_context.net.0.proj
        context_block.mlp.fc2   ff_context.net.2
        x_block.adaLN_modulation.1        norm1.linear
        """,
        "joint_blocks.{n}.",
        "transformer_blocks.{n}.",
    ),
    NameRow(
        "joint_blocks.{n}.context_block.adaLN_modulation.1",
        ("transformer_blocks.{n}.norm1_context.linear",),
        rows="swap_last_context",
    ),
    *name_rows(
        """
        context_embedder  context_embedder
        t_embedder.mlp.0  time_text_embed.timestep_embedder.linear_1
        t_embedder.mlp.2  time_text_embed.timestep_embedder.linear_2
        y_embedder.mlp.0  time_text_embed.text_embedder.linear_1
        y_embedder.mlp.2  time_text_embed.text_embedder.linear_2
        final_layer.linear proj_out
        """
    ),
    NameRow("final_layer.adaLN_modulation.1", ("norm_out.linear",), rows="swap_halves"),
)
register_module_names(
    ModuleNames(
        "sd3",
        SD3,
        marks=(r"joint[._]blocks[._]\d",),
        own_marks=(_JOINT, r"^transformer_blocks\.\d+\.attn2\."),
        component="transformer",
        model_types=("SD3Transformer2DModel",),
    )
)


def _sgm() -> tuple[NameRow, ...]:
    """Stable Diffusion XL: the blocks of Stability's UNet, and those of diffusers' UNet2DConditionModel."""
    inner = (
        ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"), ("out_layers.3", "conv2"),
        ("skip_connection", "conv_shortcut"),
    )  # fmt: skip
    rows: list[NameRow] = []
    blocks: list[tuple[str, str, str]] = []  # theirs, ours, kind
    for block in range(3):
        for layer in range(2):
            there = f"input_blocks.{1 + 3 * block + layer}"
            blocks.append((f"{there}.0", f"down_blocks.{block}.resnets.{layer}", "resnet"))
            if block:
                blocks.append((f"{there}.1", f"down_blocks.{block}.attentions.{layer}", "rest"))
        if block < 2:
            rows.append(NameRow(f"input_blocks.{3 * (block + 1)}.0.op", (f"down_blocks.{block}.downsamplers.0.conv",)))
        for layer in range(3):
            there = f"output_blocks.{3 * block + layer}"
            blocks.append((f"{there}.0", f"up_blocks.{block}.resnets.{layer}", "resnet"))
            if block < 2:
                blocks.append((f"{there}.1", f"up_blocks.{block}.attentions.{layer}", "rest"))
        if block < 2:
            rows.append(NameRow(f"output_blocks.{3 * block + 2}.2.conv", (f"up_blocks.{block}.upsamplers.0.conv",)))
    blocks += [
        ("middle_block.0", "mid_block.resnets.0", "resnet"), ("middle_block.1", "mid_block.attentions.0", "rest"),
        ("middle_block.2", "mid_block.resnets.1", "resnet"),
    ]  # fmt: skip
    for theirs, ours, kind in blocks:
        if kind == "resnet":
            rows += [NameRow(f"{theirs}.{name}", (f"{ours}.{own}",)) for name, own in inner]
        else:
            rows.append(NameRow(f"{theirs}.{{rest}}", (f"{ours}.{{rest}}",)))
    pairs = """
        input_blocks.0.0  conv_in
        out.2             conv_out
        time_embed.0      time_embedding.linear_1
        time_embed.2      time_embedding.linear_2
        label_emb.0.0     add_embedding.linear_1
        label_emb.0.2     add_embedding.linear_2
    """
    return (*rows, *name_rows(pairs))


register_module_names(
    ModuleNames(
        "sdxl",
        _sgm(),
        marks=(r"(input|output)[._]blocks[._]\d", r"middle[._]block[._]\d"),
        own_marks=(r"attentions\.\d+\.transformer_blocks\.[1-9]",),
        component="unet",
    )
)

_CLIP = ("encoder.{rest}", "embeddings.{rest}", "final_layer_norm")
# CLIP's text model: transformers left "text_model" out of the paths of CLIPTextModel in 5.6; no program's files did.
register_module_names(
    ModuleNames(
        "clip",
        tuple(NameRow(f"text_model.{name}", (name,)) for name in _CLIP),
        marks=(),
        own_marks=(r"^encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$",),
        partial=True,
        model_types=("clip_text_model",),
    )
)

# onnxruntime-genai: the model builder's names of graph inputs.
register_module_names(
    ModuleNames(
        "onnxruntime-genai",
        (
            NameRow("model.layers.{n}.attn.{rest}", ("model.layers.{n}.self_attn.{rest}",)),
            NameRow("model.layers.{n}.mlp.{rest}", ("model.layers.{n}.mlp.{rest}",)),
            NameRow("lm_head", ("lm_head",)),
        ),
        marks=(r"model\.layers\.\d+\.(attn|mlp)\.", r"lm_head$"),
        own_marks=(r"^model\.layers\.\d+\.(self_attn|mlp)\.", r"^lm_head$"),
    )
)

# Llama and its relatives: torchtune's names. Its rows of query and key heads are pairs, those of transformers halves.
register_module_names(
    ModuleNames(
        "torchtune",
        (
            NameRow("layers.{n}.attn.q_proj", ("model.layers.{n}.self_attn.q_proj",), rows="query_heads"),
            NameRow("layers.{n}.attn.k_proj", ("model.layers.{n}.self_attn.k_proj",), rows="key_heads"),
            *name_rows(
                """
                attn.v_proj       self_attn.v_proj
                attn.output_proj  self_attn.o_proj
                mlp.w1            mlp.gate_proj
                mlp.w2            mlp.down_proj
                mlp.w3            mlp.up_proj
                """,
                "layers.{n}.",
                "model.layers.{n}.",
            ),
            NameRow("output", ("lm_head",)),
        ),
        marks=(r"layers\.\d+\.(attn|mlp)\.", r"output$"),
        own_marks=(r"^model\.layers\.\d+\.(self_attn|mlp)\.", r"^lm_head$"),
    )
)

# diffusers until 0.17: processors of attentions, and layers beside Linears.
_ATTENTIONS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
register_module_names(
    ModuleNames(
        "diffusers-old",
        (
            *(NameRow(f"{{rest}}.processor.{there}", (f"{{rest}}.{here}",)) for there, here in _ATTENTIONS.items()),
            NameRow("{rest}.lora_linear_layer", ("{rest}",)),
        ),
        marks=(r".*\.(processor|lora_linear_layer)",),
        own_marks=(r".",),
    )
)

# Names of modules that contain "_", and those that stand beside them: to read paths that are written with "_".
WORDS = frozenset(
    """
    down_blocks up_blocks mid_block attentions resnets downsamplers upsamplers transformer_blocks attn attn1 attn2 to_q
    to_k to_v to_out ff net proj proj_in proj_out conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj
    time_embedding add_embedding linear_1 linear_2 norm1 norm2 norm3 linear norm norm_out norm1_context
    single_transformer_blocks ff_context add_q_proj add_k_proj add_v_proj to_add_out to_q_b norm_q norm_k
    norm_added_q norm_added_k proj_mlp time_text_embed timestep_embedder text_embedder guidance_embedder x_embedder
    context_embedder pos_embed
    double_blocks single_blocks img_attn txt_attn qkv img_mlp txt_mlp img_mod txt_mod lin modulation linear1 linear2
    img_in txt_in time_in vector_in guidance_in in_layer out_layer final_layer adaLN_modulation query_norm key_norm
    joint_blocks x_block context_block mlp fc1 fc2 t_embedder y_embedder
    input_blocks output_blocks middle_block in_layers out_layers emb_layers skip_connection op time_embed label_emb out
    text_model encoder layers self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 text_projection
    final_layer_norm embeddings token_embedding position_embedding
    block layer SelfAttention EncDecAttention DenseReluDense q k v o wi wi_0 wi_1 wo layer_norm final_layer_norm shared
    """.split()
)
