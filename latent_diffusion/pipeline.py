"""`LatentDiffusion`: the networks and weights of a trained model, and what one does with them. The public API.

    model = LatentDiffusion.from_workdir("runs/ldm")
    model.sample(prompts=["red apple"], num_samples=4, guidance_scale=3.0).images  # uint8 (4, H, W, 3)
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int, UInt8

from latent_diffusion import checkpoint, images, models, parallel, programs, request, tensor_files
from latent_diffusion import conditions as conditions_lib
from latent_diffusion import layouts as layouts_lib
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import text_encoder

AnyArray = jax.Array | np.ndarray
Layouts = layouts_lib.Objects | Sequence[layouts_lib.Objects] | None
BATCH_SIZE = 16  # pictures that are drawn at once, where the caller does not say


# --- the model -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Samples:
    """images (N, H, W, C) uint8 and the scaled latents (N, h, w, c) float32 that they were decoded from."""

    images: UInt8[np.ndarray, "n h w c"]
    latents: Float[np.ndarray, "n h2 w2 d"]


def _joined(batches: Iterator[Samples]) -> Samples:
    parts = list(batches)
    return Samples(np.concatenate([part.images for part in parts]), np.concatenate([part.latents for part in parts]))


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """A latent diffusion model. Instances with equal networks share compiled programs, whatever their weights.

    config: of stage 2. params: ``{"unet", "conditioner"?, "first_stage"}``, on the host or replicated over the local
    devices. scale_factor: latents that the UNet sees = scale_factor x the first stage's. vocabulary: of a text model.
    label_names, object_names: names of the classes of pictures and of objects in layouts, if they have any. step: how
    long the model was trained.
    """

    config: Any
    models: models.Models
    schedule: schedule_lib.NoiseSchedule
    params: Mapping[str, Any]
    scale_factor: float
    vocabulary: conditions_lib.Tokenizer | None = None
    label_names: tuple[str, ...] = ()
    object_names: tuple[str, ...] = ()
    step: int = 0

    @classmethod
    def from_workdir(cls, path: epath.PathLike, step: int | None = None) -> "LatentDiffusion":
        """Reads a stage-2 workdir: EMA weights where there are any, and the first stage's copy.

        Args:
          path: the `--workdir` of the training run, local or a bucket.
          step: which checkpoint; the latest complete one by default.

        Raises:
          UserError: no such workdir, one of stage 1, or no (complete) checkpoint there.
        """
        config, path = request.read_config(path), request.absolute(path)
        networks = models.build(config)
        trees, metadata, step = checkpoint.load(path, ("params", "ema"), step)
        params = stage2.sampling_params(trees["params"], trees["ema"])
        first_stage = {}
        if config.first_stage.model.kind != "identity":
            first_stage = checkpoint.load_frozen(path)[0]["autoencoder"]
        params = {name: params[name] for name in ("unet", "conditioner") if name in params}
        params = stage2.with_frozen(params, {"conditioner": text_encoder.read(config, networks, path)})
        text = "tokens" in request.condition_fields(config)
        return cls(
            config=config, models=networks, schedule=schedule_lib.from_config(config.diffusion),
            params=parallel.replicate(params | {"first_stage": first_stage}),
            scale_factor=float(metadata["scale_factor"]),
            vocabulary=conditions_lib.saved_tokenizer(path, config.conditioning.text.kind) if text else None,
            label_names=request.read_names(path), object_names=request.read_names(path, "objects"), step=step)

    @classmethod
    def from_compvis(
        cls, weights: epath.PathLike, description: epath.PathLike | Mapping[str, Any], *, use_ema: bool = True,
        vocabulary: conditions_lib.Tokenizer | None = None,
    ) -> "LatentDiffusion":
        """A model of CompVis latent-diffusion, without a workdir.

        Args:
          weights: its file, ``.ckpt`` or ``.safetensors``.
          description: its yaml file, or that as nested mappings.
          use_ema: the averages, where there are any.
          vocabulary: the tokenizer of a text model (`conditions.load_vocabulary`, `clip_tokens.load`).

        Raises:
          UserError: see `interop.compvis.import_model`; also, a first stage.
        """
        from latent_diffusion.interop import compvis, compvis_settings  # need ml_collections, which sampling does not

        tensors, rest = tensor_files.open_tensors(weights)
        description = description if isinstance(description, Mapping) else compvis_settings.read(description)
        config, params = compvis.import_model(description, tensors, use_ema=use_ema)
        if config.stage != "diffusion":
            raise UserError(f"{weights} is a first stage; give a diffusion model")
        return cls._of_others(config, params, vocabulary, int(rest.get("global_step", 0)))

    @classmethod
    def from_diffusers(cls, folder: epath.PathLike) -> "LatentDiffusion":
        """The model of a pipeline's folder, with its tokenizer. Raises UserError: see
        `interop.diffusers.import_model`."""
        from latent_diffusion.interop import diffusers

        config, params = diffusers.import_model(folder)
        return cls._of_others(config, params, diffusers.tokenizer(folder, config))

    @classmethod
    def _of_others(
        cls, config: Any, params: Mapping[str, Any], vocabulary: conditions_lib.Tokenizer | None, step: int = 0
    ) -> "LatentDiffusion":
        params = {name: params[name] for name in ("unet", "conditioner", "first_stage") if name in params}
        return cls(
            config=config, models=models.build(config), schedule=schedule_lib.from_config(config.diffusion),
            params=parallel.replicate({"first_stage": {}} | params), scale_factor=config.first_stage.scale_factor,
            vocabulary=vocabulary, step=step)

    def sample(
        self,
        prompts: str | Sequence[str] | None = None,
        labels: request.Labels | None = None,
        *,
        layouts: Layouts = None,
        vectors: np.ndarray | None = None,
        segmentation: np.ndarray | None = None,
        low_res: np.ndarray | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        num_samples: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        eta: float | None = None,
        seed: int = 0,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        batch_size: int | None = None,
    ) -> Samples:
        """Draws pictures. The same seed gives the same pictures for any `batch_size` and number of devices.

        What is not given comes from ``config.sampling``. Only `steps`, `sampler`, `size`, `tile`, `overlap` and
        `batch_size` compile anew when changed, and guidance where there was none. A condition that the model takes and
        that is not given is its null condition.

        Args:
          prompts: texts, of a text model.
          labels: class numbers or names, of a class-conditional model; paired with the prompts if both are given.
          layouts: objects with boxes, of a layout model.
          vectors: (n, l, width) or (n, width) float, of a model that is conditioned on vectors from elsewhere.
          segmentation, low_res, image, mask: what a model for semantic maps, super-resolution or inpainting must have,
            see `request.resolve_maps`. Known pixels of an inpainted picture are returned exactly.
          num_samples: how many pictures; the conditions are repeated in turn. One for each condition by default.
          steps: of the sampler, 1 .. T.
          guidance_scale: of classifier-free guidance: 1 = none, above 1 = closer to the condition. If it comes from the
            config and is 1, the unconditional pass is left out, which halves the work.
          sampler: "ddim", "ddpm" or "plms".
          eta: noise of ddim, from 0 (none) to 1 (as much as ddpm); the others do not use it.
          seed: 0 .. 2^32 - 1. Picture k depends on the seed and k only.
          size: height and width in pixels; that of the map, or else of the training images by default.
          tile, overlap: for pictures that do not fit into memory: the UNet, the encoder and the decoder work on patches
            of `tile` pixels that overlap by `overlap` (a quarter), and the patches are blended.
          batch_size: pictures at once over all local devices (rounded up to a multiple of them).

        Raises:
          UserError: see the functions of `request`; also, latents that are not finite.
        """
        return _joined(self.sample_batches(
            prompts, labels, layouts=layouts, vectors=vectors, segmentation=segmentation, low_res=low_res, image=image,
            mask=mask, num_samples=num_samples, batch_size=batch_size, steps=steps, guidance_scale=guidance_scale,
            sampler=sampler, eta=eta, seed=seed, size=size, tile=tile, overlap=overlap))

    def sample_batches(
        self,
        prompts: str | Sequence[str] | None = None,
        labels: request.Labels | None = None,
        *,
        layouts: Layouts = None,
        vectors: np.ndarray | None = None,
        segmentation: np.ndarray | None = None,
        low_res: np.ndarray | None = None,
        image: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        num_samples: int | None = None,
        batch_size: int | None = None,
        size: tuple[int, int] | None = None,
        **settings: Any,
    ) -> Iterator[Samples]:
        """`sample`, one batch after the other as they are ready; same arguments. Mistakes are found at the call."""
        maps = request.resolve_maps(self.config, segmentation=segmentation, low_res=low_res, image=image, mask=mask)
        asked = request.resolve_settings(self.config, size=request.size_of_maps(self.config, maps, size), **settings)
        prompts, labels = request.resolve_conditions(self.config, prompts, labels, self.label_names)
        request.warn_of_untrained(self.config, prompts, labels)
        layouts, vectors = request.resolve_layouts(self.config, layouts), request.resolve_vectors(self.config, vectors)
        given = [x for x in (prompts, labels, layouts, vectors, *maps.values()) if x is not None]
        number = max(map(len, given), default=1) if num_samples is None else num_samples
        if number < 1:
            raise UserError(f"num_samples={number} must be 1 or more")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be 1 or more")
        conditions = maps | self.conditions(
            prompts, labels, number, layouts, request.patches(self.config, asked), vectors)
        if prompts is None and labels is None and layouts is None and vectors is None:  # nothing to be guided to
            asked = dataclasses.replace(asked, guided=False)
        return self._draw_batches(asked, conditions, number, batch_size)

    def sample_arrays(self, conditions: Mapping[str, np.ndarray], *, seed: int = 0) -> Samples:
        """`sample` with the settings of ``config.sampling``, for conditions as a batch of training holds them.

        Args:
          conditions: one row for each picture, of every field that `request.condition_fields` and `request.map_fields`
            name: tokens, layout int32 (n, l); label int32 (n,); and what `request.resolve_maps` returns.
        """
        maps = {name: conditions[name] for name in request.map_fields(self.config)}
        asked = request.resolve_settings(self.config, seed=seed, size=request.size_of_maps(self.config, maps))
        return _joined(self._draw_batches(asked, conditions, len(next(iter(conditions.values()))), None))

    def conditions(
        self, prompts: Sequence[str] | None, labels: Sequence[int] | None, number: int,
        layouts: Sequence[layouts_lib.Objects] | None = None, patches: Sequence[Sequence[float]] = (),
        vectors: np.ndarray | None = None,
    ) -> dict[str, Int[np.ndarray, "n ..."]]:
        """Arrays for `number` pictures, ``tokens`` (n, l), ``layout`` (n, l), ``vectors`` (n, l, d) and/or ``label``
        (n,), as the model takes them: given ones repeated in turn, null ones where None. Of layouts with `patches`
        (left, top, width, height), relative to the picture, there is one for each of these, (n, p, l): what a crop of
        the picture has in training.
        """
        options, fields = self.config.conditioning, request.condition_fields(self.config)
        if "tokens" in fields and self.vocabulary is None:
            raise UserError("this model takes text but came without its vocabulary (vocab.txt of its workdir)")
        if "label" in fields and labels is None and not options.null_class:
            raise UserError("this model has no class for \"no class\": give labels")
        arrays = {name: null[None] for name, null in request.null_conditions(self.config, self.vocabulary).items()}
        if prompts is not None:
            length = options.text.max_length
            for prompt in self.vocabulary.too_long(prompts, length):
                logging.warning("prompt %r has more than %d tokens, the most of this model, and is cut", prompt, length)
            arrays["tokens"] = self.vocabulary.encode(prompts, length)
        if layouts is not None:
            arrays["layout"] = np.array([[layouts_lib.to_tokens(objects, options.layout, crop=crop)
                                          for crop in patches or [layouts_lib.WHOLE]] for objects in layouts])
            arrays["layout"] = arrays["layout"] if patches else arrays["layout"][:, 0]
        elif "layout" in fields and patches:
            arrays["layout"] = np.repeat(arrays["layout"][:, None], len(patches), axis=1)
        if vectors is not None:
            arrays["vectors"] = vectors
        if labels is not None:
            arrays["label"] = np.asarray(labels, np.int32)
        return {name: rows[np.arange(number) % len(rows)] for name, rows in arrays.items()}

    def _draw_batches(
        self, asked: request.Settings, conditions: Mapping[str, np.ndarray], number: int, batch_size: int | None
    ) -> Iterator[Samples]:
        devices = jax.local_device_count()
        batch_size = math.ceil((batch_size or min(number, BATCH_SIZE)) / devices) * devices
        run = programs.compiled(self._program(asked))
        shared = parallel.replicate({
            "params": dict(self.params), "key": jax.random.key(asked.seed),
            "null": self.conditions(None, None, 1, patches=request.patches(self.config, asked)) if asked.guided else {},
            "scale_factor": np.float32(self.scale_factor), "guidance_scale": np.float32(asked.guidance_scale),
            "eta": np.float32(asked.eta)})
        for start in range(0, number, batch_size):
            index = np.arange(start, start + batch_size, dtype=np.int32)
            rows = np.minimum(index, number - 1)  # the last batch is filled up, what is too many dropped
            given = {name: x[rows % len(x)] for name, x in conditions.items()}
            batch = parallel.shard({"index": index} | given)
            z_0, x = (part[: number - start] for part in parallel.gather(run(shared, batch)))
            finite = np.isfinite(z_0).all((1, 2, 3)) & np.isfinite(x).all((1, 2, 3))
            if not finite.all():
                raise UserError(
                    f"the latents of picture {start + int(np.argmin(finite))} are not finite: the training diverged "
                    f"before step {self.step}, or guidance_scale={asked.guidance_scale:g} is far too large")
            pictures = images.to_uint8(x)
            if "mask" in conditions:  # what is known stays as it is, to the last bit
                mask, known = (given[name][: len(x)] for name in ("mask", "image"))
                pictures = np.where(mask > 0.5, pictures, images.to_uint8(known))
            yield Samples(pictures, z_0)

    @property
    def _conditioning(self) -> programs.Conditioning:
        options = self.config.conditioning
        return programs.Conditioning(options.crossattn, bool(options.label), options.concat)

    def _program(self, asked: request.Settings) -> programs.Program:
        first_stage = self.models.first_stage
        factor = first_stage.factor
        height, width = (side // factor for side in asked.size)
        return programs.Program(
            models=self.models, schedule=self.schedule, conditioning=self._conditioning,
            parameterization=self.config.diffusion.parameterization, sampler=asked.sampler, steps=asked.steps,
            spacing=asked.spacing, clip_x0=asked.clip_x0, guided=asked.guided,
            latent_shape=(height, width, first_stage.latent_channels),
            tile=programs.Tile(asked.tile // factor, asked.overlap // factor, factor) if asked.tile else None)

    def encode(self, x: Float[AnyArray, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Images in [-1, 1] -> scaled latents: the posterior's mode (training draws from it), before quantization."""
        return programs.encode(self.params, x, self.scale_factor, models=self.models)

    def decode(self, z: Float[AnyArray, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        """Scaled latents -> images, about [-1, 1], not clipped. A VQ first stage quantizes before it decodes."""
        return programs.decode(self.params, z, self.scale_factor, models=self.models)

    def denoise(
        self, z_t: Float[AnyArray, "b h w c"], t: int | Int[AnyArray, "*b"],
        condition: Mapping[str, AnyArray] | None = None,
    ) -> Float[Array, "b h w c"]:
        """The network's prediction of what ``config.diffusion.parameterization`` says, without guidance.

        t: one for all or one for each, 0 .. T-1. condition: arrays as `conditions` and `request.resolve_maps` make;
        None = the null condition, of a model without maps.
        """
        if condition is None:
            condition = self.conditions(None, None, len(z_t))
        return programs.denoise(self.params, z_t, t, dict(condition), models=self.models, options=self._conditioning)
