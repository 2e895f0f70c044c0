"""Keys and torch shapes of the state dicts of CompVis latent-diffusion, from the structure of its networks alone, and
its yaml descriptions as dicts: what a test compares the package's own tables with."""

import numpy as np

# --- layers ----------------------------------------------------------------------------------------------------------


def _prefixed(prefix, shapes):
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def _norm(channels):
    return {"weight": (channels,), "bias": (channels,)}


def _conv(channels, into, kernel=3, bias=True):
    return {"weight": (into, channels, kernel, kernel)} | ({"bias": (into,)} if bias else {})


def _linear(channels, into, bias=True):
    return {"weight": (into, channels)} | ({"bias": (into,)} if bias else {})


def _join(**parts):
    return {key: shape for name, shapes in parts.items() for key, shape in _prefixed(name, shapes).items()}


# --- first stages ----------------------------------------------------------------------------------------------------


def _resnet(channels, into):
    found = _join(norm1=_norm(channels), conv1=_conv(channels, into), norm2=_norm(into), conv2=_conv(into, into))
    return found | (_join(nin_shortcut=_conv(channels, into, 1)) if channels != into else {})


def _attention(channels, kind):
    if kind == "linear":
        return _join(to_qkv=_conv(channels, 3 * channels, 1, bias=False), to_out=_conv(channels, channels, 1))
    return _join(norm=_norm(channels), **{name: _conv(channels, channels, 1) for name in ("q", "k", "v", "proj_out")})


def _middle(channels, kind):
    middle = {"mid.block_1": _resnet(channels, channels), "mid.block_2": _resnet(channels, channels)}
    return _join(**middle | ({"mid.attn_1": _attention(channels, kind)} if kind != "none" else {}))


def first_stage(params):
    """Of the ``params`` of an autoencoder; vector-quantized with ``n_embed``."""
    dd, embed, entries = params["ddconfig"], params["embed_dim"], params.get("n_embed")
    ch, mult, blocks, z = dd["ch"], dd["ch_mult"], dd["num_res_blocks"], dd["z_channels"]
    kind, last = dd.get("attn_type", "vanilla"), len(mult) - 1
    doubled = 1 if entries else 2

    def attends(level):
        return kind != "none" and dd["resolution"] // 2**level in dd["attn_resolutions"]

    encoder, channels = {"conv_in": _conv(dd["in_channels"], ch)}, ch
    for level, factor in enumerate(mult):
        for block in range(blocks):
            encoder[f"down.{level}.block.{block}"] = _resnet(channels, ch * factor)
            channels = ch * factor
            if attends(level):
                encoder[f"down.{level}.attn.{block}"] = _attention(channels, kind)
        if level < last and dd.get("resamp_with_conv", True):
            encoder[f"down.{level}.downsample.conv"] = _conv(channels, channels)
    encoder |= {"norm_out": _norm(channels), "conv_out": _conv(channels, doubled * z)}
    decoder = {"conv_in": _conv(z, channels)}
    middle = _middle(channels, kind)
    for level in range(last, -1, -1):
        for block in range(blocks + 1):
            decoder[f"up.{level}.block.{block}"] = _resnet(channels, ch * mult[level])
            channels = ch * mult[level]
            if attends(level):
                decoder[f"up.{level}.attn.{block}"] = _attention(channels, kind)
        if level and dd.get("resamp_with_conv", True):
            decoder[f"up.{level}.upsample.conv"] = _conv(channels, channels)
    decoder |= {"norm_out": _norm(channels), "conv_out": _conv(channels, dd["out_ch"])}
    found = _prefixed("encoder", _join(**encoder) | middle) | _prefixed("decoder", _join(**decoder) | middle)
    found |= _join(quant_conv=_conv(doubled * z, doubled * embed, 1), post_quant_conv=_conv(embed, z, 1))
    return found | ({"quantize.embedding.weight": (entries, embed)} if entries else {})


VGG = {1: ((0, 3, 64), (2, 64, 64)), 2: ((5, 64, 128), (7, 128, 128)),
       3: ((10, 128, 256), (12, 256, 256), (14, 256, 256)), 4: ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
       5: ((24, 512, 512), (26, 512, 512), (28, 512, 512))}


def losses(channels, layers, norm, kl):
    """What the file of a first stage has beside its networks: LPIPS, the discriminator, the log-variance."""
    found = _join(**{f"net.slice{i}.{n}": _conv(a, b) for i, convs in VGG.items() for n, a, b in convs},
                  **{f"lin{i}.model.1": _conv(width, 1, 1, bias=False)
                     for i, width in enumerate((64, 128, 256, 512, 512))})
    found |= {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
    widths = [channels * min(2**n, 8) for n in range(layers + 1)]
    main = {"0": _conv(3, widths[0], 4)}
    for n in range(1, layers + 1):
        into = widths[n]
        main[str(3 * n - 1)] = _conv(widths[n - 1], into, 4, bias=norm == "actnorm")
        main[str(3 * n)] = {"loc": (1, into, 1, 1), "scale": (1, into, 1, 1), "initialized": ()} if (
            norm == "actnorm") else _norm(into) | {"running_mean": (into,), "running_var": (into,),
                                                   "num_batches_tracked": ()}
    main[str(3 * layers + 2)] = _conv(widths[-1], 1, 4)
    return _prefixed("loss", _prefixed("perceptual_loss", found) | _prefixed("discriminator.main", _join(**main)) | (
        {"logvar": ()} if kl else {}))


# --- the UNet --------------------------------------------------------------------------------------------------------


def _res_block(channels, into, emb, scale_shift):
    found = {"in_layers.0": _norm(channels), "in_layers.2": _conv(channels, into),
             "emb_layers.1": _linear(emb, 2 * into if scale_shift else into),
             "out_layers.0": _norm(into), "out_layers.3": _conv(into, into)}
    return _join(**found | ({"skip_connection": _conv(channels, into, 1)} if channels != into else {}))


def _attention_block(channels):
    return {"norm.weight": (channels,), "norm.bias": (channels,), "qkv.weight": (3 * channels, channels, 1),
            "qkv.bias": (3 * channels,), "proj_out.weight": (channels, channels, 1), "proj_out.bias": (channels,)}


def _spatial_transformer(channels, depth, context):
    found = {"norm": _norm(channels), "proj_in": _conv(channels, channels, 1), "proj_out": _conv(channels, channels, 1)}
    for d in range(depth):
        block = f"transformer_blocks.{d}."
        for name, width in (("attn1", channels), ("attn2", context or channels)):
            found |= {f"{block}{name}.to_q": _linear(channels, channels, False),
                      f"{block}{name}.to_k": _linear(width, channels, False),
                      f"{block}{name}.to_v": _linear(width, channels, False),
                      f"{block}{name}.to_out.0": _linear(channels, channels)}
        found |= {f"{block}ff.net.0.proj": _linear(channels, 8 * channels),
                  f"{block}ff.net.2": _linear(4 * channels, channels)}
        found |= {f"{block}norm{i}": _norm(channels) for i in (1, 2, 3)}
    return _join(**found)


def unet(p):
    """Of the ``params`` of a UNetModel."""
    width, mult, blocks = p["model_channels"], p["channel_mult"], p["num_res_blocks"]
    emb, scale_shift, updown = 4 * width, p.get("use_scale_shift_norm"), p.get("resblock_updown")
    with_conv = p.get("conv_resample", True)

    def attention(channels):
        return _spatial_transformer(channels, p.get("transformer_depth", 1), p.get("context_dim")) if (
            p.get("use_spatial_transformer")) else _attention_block(channels)

    found = {"time_embed.0": _linear(width, emb), "time_embed.2": _linear(emb, emb)}
    if p.get("num_classes"):
        found["label_emb"] = {"weight": (p["num_classes"], emb)}
    found["input_blocks.0.0"] = _conv(p["in_channels"], width)
    channels, skips, ds = width, [width], 1
    for level, factor in enumerate(mult):
        for _ in range(blocks):
            found[f"input_blocks.{len(skips)}.0"] = _res_block(channels, width * factor, emb, scale_shift)
            channels = width * factor
            if ds in p["attention_resolutions"]:
                found[f"input_blocks.{len(skips)}.1"] = attention(channels)
            skips.append(channels)
        if level < len(mult) - 1:
            if updown:
                found[f"input_blocks.{len(skips)}.0"] = _res_block(channels, channels, emb, scale_shift)
            elif with_conv:
                found[f"input_blocks.{len(skips)}.0.op"] = _conv(channels, channels)
            skips.append(channels)
            ds *= 2
    found |= {"middle_block.0": _res_block(channels, channels, emb, scale_shift), "middle_block.1": attention(channels),
              "middle_block.2": _res_block(channels, channels, emb, scale_shift)}
    number = 0
    for level in range(len(mult) - 1, -1, -1):
        for block in range(blocks + 1):
            name, part = f"output_blocks.{number}", 1
            found[f"{name}.0"] = _res_block(channels + skips.pop(), width * mult[level], emb, scale_shift)
            channels = width * mult[level]
            if ds in p["attention_resolutions"]:
                found[f"{name}.1"], part = attention(channels), 2
            if level and block == blocks:
                if updown:
                    found[f"{name}.{part}"] = _res_block(channels, channels, emb, scale_shift)
                elif with_conv:
                    found[f"{name}.{part}.conv"] = _conv(channels, channels)
                ds //= 2
            number += 1
    return _join(**found | {"out.0": _norm(channels), "out.2": _conv(channels, p["out_channels"])})


# --- conditioners ----------------------------------------------------------------------------------------------------


def text(vocabulary, length, layers, width):
    """A transformer over tokens, of texts or layouts."""
    found = {"token_emb": {"weight": (vocabulary, width)}, "pos_emb.emb": {"weight": (length, width)},
             "norm": _norm(width), "to_logits": _linear(width, vocabulary)}
    for k in range(layers):
        attn, ff = f"attn_layers.layers.{2 * k}", f"attn_layers.layers.{2 * k + 1}"
        found |= {f"{attn}.1.{name}": _linear(width, 512, False) for name in ("to_q", "to_k", "to_v")}
        found |= {f"{attn}.0": _norm(width), f"{attn}.1.to_out": _linear(512, width), f"{ff}.0": _norm(width),
                  f"{ff}.1.net.0.0": _linear(width, 4 * width), f"{ff}.1.net.2": _linear(4 * width, width)}
    return _prefixed("transformer", _join(**found))


def clip(vocabulary, length, layers, width):
    found = {"embeddings.token_embedding": {"weight": (vocabulary, width)},
             "embeddings.position_embedding": {"weight": (length, width)}, "final_layer_norm": _norm(width)}
    for k in range(layers):
        layer = f"encoder.layers.{k}."
        found |= {f"{layer}self_attn.{name}_proj": _linear(width, width) for name in ("q", "k", "v", "out")}
        found |= {f"{layer}layer_norm1": _norm(width), f"{layer}layer_norm2": _norm(width),
                  f"{layer}mlp.fc1": _linear(width, 4 * width), f"{layer}mlp.fc2": _linear(4 * width, width)}
    return _prefixed("transformer.text_model", _join(**found) | {"embeddings.position_ids": (1, length)})


def conditioner(part):
    """Of a ``cond_stage_config``; none for a name."""
    if isinstance(part, str):
        return {}
    name, p = part["target"].rsplit(".", 1)[-1], part.get("params", {})
    if name == "ClassEmbedder":
        return {"embedding.weight": (p["n_classes"], p["embed_dim"])}
    if name == "BERTEmbedder":
        return text(p.get("vocab_size", 30522), p.get("max_seq_len", 77), p["n_layer"], p["n_embed"])
    if name == "SpatialRescaler":
        return {"channel_mapper.weight": (p["out_channels"], p["in_channels"], 1, 1)}
    return {}


# --- whole files -----------------------------------------------------------------------------------------------------


def schedule(params):
    """The tables of the linear schedule, float64."""
    start, end, steps = params["linear_start"], params["linear_end"], params.get("timesteps", 1000)
    betas = np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2
    acp = np.cumprod(1 - betas)
    previous = np.append(1.0, acp[:-1])
    variance = betas * (1 - previous) / (1 - acp)
    return {"betas": betas, "alphas_cumprod": acp, "alphas_cumprod_prev": previous, "sqrt_alphas_cumprod": np.sqrt(acp),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - acp), "log_one_minus_alphas_cumprod": np.log(1 - acp),
            "sqrt_recip_alphas_cumprod": np.sqrt(1 / acp), "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / acp - 1),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
            "posterior_mean_coef1": betas * np.sqrt(previous) / (1 - acp),
            "posterior_mean_coef2": (1 - previous) * np.sqrt(1 - betas) / (1 - acp)}


def networks(description):
    """{"unet", "first_stage", "conditioner"}: shapes by the names of each module alone."""
    params = description["model"]["params"]
    first = params.get("first_stage_config", {}).get("params")
    return {"unet": unet(params["unet_config"]["params"]), "first_stage": first_stage(first) if first else {},
            "conditioner": conditioner(params.get("cond_stage_config", "__is_unconditional__"))}


def diffusion(description):
    """Shapes of all keys that a file of a diffusion model has but for the tables of the schedule."""
    params, parts = description["model"]["params"], networks(description)
    found = _prefixed("model.diffusion_model", parts["unet"])
    if params.get("use_ema", True):
        found |= {f"model_ema.diffusion_model{name.replace('.', '')}": shape for name, shape in parts["unet"].items()}
        found |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    found |= _prefixed("first_stage_model", parts["first_stage"])
    found |= _prefixed("cond_stage_model", parts["conditioner"])
    if params.get("cond_stage_config") == "__is_first_stage__":
        found |= _prefixed("cond_stage_model", parts["first_stage"])
    if params.get("scale_by_std"):
        found["scale_factor"] = ()
    if params.get("learn_logvar"):
        found["logvar"] = (params.get("timesteps", 1000),)
    return found


def count(shapes):
    return sum(int(np.prod(shape)) for shape in shapes.values())


# --- descriptions ----------------------------------------------------------------------------------------------------

ENCODERS = "ldm.modules.encoders.modules."


def describe_first_stage(kind, z, mult, attn=(), entries=0, *, ch=128, blocks=2, resolution=256, attn_type="vanilla",
                         interface=False, loss=None, **dd):
    """kind: "kl" or "vq"."""
    params = {"embed_dim": z, "monitor": "val/rec_loss", "ddconfig": {
        "double_z": kind == "kl", "z_channels": z, "resolution": resolution, "in_channels": 3, "out_ch": 3, "ch": ch,
        "ch_mult": list(mult), "num_res_blocks": blocks, "attn_resolutions": list(attn), "dropout": 0.0, **dd}}
    if attn_type != "vanilla":
        params["ddconfig"]["attn_type"] = attn_type
    if entries:
        params["n_embed"] = entries
    params["lossconfig"] = loss or {"target": "torch.nn.Identity"}
    name = "AutoencoderKL" if kind == "kl" else "VQModelInterface" if interface else "VQModel"
    return {"target": f"ldm.models.autoencoder.{name}", "params": params}


def describe_diffusion(first_stage, unet, betas, condition=None, *, target="LatentDiffusion", rate=1e-6, **params):
    """condition: (conditioning_key, cond_stage_key, cond_stage_config)."""
    params = {"linear_start": betas[0], "linear_end": betas[1], "timesteps": 1000, "num_timesteps_cond": 1,
              "log_every_t": 200, "first_stage_key": "image", "image_size": unet["image_size"],
              "channels": unet["out_channels"], "monitor": "val/loss_simple_ema",
              "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet}} | params
    if first_stage:
        params["first_stage_config"] = first_stage
    if condition:
        params |= dict(zip(("conditioning_key", "cond_stage_key", "cond_stage_config"), condition, strict=True))
    elif target != "DDPM":
        params["cond_stage_config"] = "__is_unconditional__"
    return {"model": {"base_learning_rate": rate, "target": f"ldm.models.diffusion.ddpm.{target}", "params": params}}


def encoder(name, **params):
    return {"target": ENCODERS + name, "params": params}


IDENTITY = {"target": "torch.nn.Identity"}
