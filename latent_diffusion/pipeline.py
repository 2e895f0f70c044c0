"""`LatentDiffusion`: the networks and weights of a trained model, and what one does with them. The public API.

    model = LatentDiffusion.from_workdir("runs/ldm")
    model.sample(prompts=["red apple"], num_samples=4, guidance_scale=3.0).images  # uint8 (4, H, W, 3)
"""

import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from latent_diffusion import checkpoint, drawing, editing, models, parallel, programs, request, tensor_files
from latent_diffusion import conditions as conditions_lib
from latent_diffusion import layouts as layouts_lib
from latent_diffusion import settings as settings_lib
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError
from latent_diffusion.models.layers import compute_dtype
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import text_encoder

AnyArray = jax.Array | np.ndarray
Layouts = layouts_lib.Objects | Sequence[layouts_lib.Objects] | None


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

    def computing_in(self, dtype: str) -> "LatentDiffusion":
        """The same model with all networks computing in "float32" or "bfloat16", whatever it was trained in; weights
        stay as they are. Raises UserError for another type."""
        compute_dtype(dtype)
        config = copy.deepcopy(self.config)
        with config.unlocked():
            config.model.dtype = dtype
            config.first_stage.model.dtype = dtype
        return dataclasses.replace(self, config=config, models=models.build(config))

    def sample(
        self, prompts: str | Sequence[str] | None = None, labels: request.Labels | None = None, **options: Any
    ) -> drawing.Samples:
        """Draws pictures. The same seed gives the same pictures for any `batch_size` and number of devices.

        A condition that the model takes and that is not given is its null condition.

        Args:
          prompts: texts, of a text model.
          labels: class numbers or names, of a class-conditional model; paired with the prompts if both are given.
          options: the other arguments of `sample_batches`.

        Raises:
          UserError: see `sample_batches`.
        """
        return drawing.joined(self.sample_batches(prompts, labels, **options))

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
        strength: float | None = None,
        negative_prompts: str | Sequence[str] | None = None,
        upsample: np.ndarray | None = None,
        upsample_scale: float = 1.0,
        variation: float | Sequence[float] | None = None,
        variation_seed: int | None = None,
        noise: np.ndarray | None = None,
        same_noise: bool = False,
        weak: "LatentDiffusion | None" = None,
        correction: Any = None,
        num_samples: int | None = None,
        only: Sequence[int] | None = None,
        batch_size: int | None = None,
        frames: int = 0,
        report: bool = False,
        size: tuple[int, int] | None = None,
        **settings: Any,
    ) -> Iterator[drawing.Samples]:
        """`sample`, one batch after the other as they are ready. Mistakes are found at the call.

        Args:
          prompts, labels: see `sample`.
          layouts: objects with boxes, of a layout model.
          vectors: (n, l, width) or (n, width) float, of a model that is conditioned on vectors from elsewhere.
          segmentation, low_res: what a model for semantic maps or super-resolution must have, see
            `request.resolve_maps`.
          image, mask: a picture, uint8, and where to paint in it. A model for inpainting sees both; any other draws
            what is white in the mask around what is known. Known pixels are returned exactly. `editing.outpaint` makes
            both.
          strength: of image-to-image, with `image`: 0 (it stays) .. 1 (little of it does).
          negative_prompts: what guidance moves away from, instead of from the empty caption; one, or one for each
            picture.
          upsample: small pictures, uint8, that the samples of an unconditional model are guided to look like when small
            (paper, appendix C), with `upsample_scale` times the gradient.
          variation: 0 .. 1, how far the noise is turned toward that of `variation_seed`; several: one for each picture.
          noise: (n, h, w, c) to start from, instead of that of the seed.
          same_noise: all pictures start from the noise of picture 0.
          weak: a weaker model of the same latents that guidance moves away from (autoguidance).
          correction: ``f(eps, z_t, t, arguments) -> eps`` and its last argument, a tree of arrays, in a tuple: changes
            the predicted noise at each step, see `diffusion.guidance.corrected` and `classifier`.
          num_samples: how many pictures; the conditions are repeated in turn. One for each condition by default.
          only: numbers of the pictures to draw, out of 0 .. num_samples - 1.
          batch_size: pictures at once over all local devices (rounded up to a multiple of them).
          frames: how many of the predictions on the way to return.
          report: tell `programs.listening` of each step.
          size: height and width in pixels, which the first stage divides.
          settings: steps, guidance_scale, sampler, seed, tile, ..: see `settings.Settings` and `settings.resolve`.

        Raises:
          UserError: see `settings.resolve` and the functions of `request` and `editing`; also, latents that are not
            finite.
        """
        config = self.config
        maps, edit = editing.resolve_all(
            config, strength, segmentation=segmentation, low_res=low_res, image=image, mask=mask)
        asked = settings_lib.resolve(
            config, size=settings_lib.size_of_maps(config, maps | edit, size), strength=strength, weak=weak is not None,
            **settings)
        arrays = editing.pad(config, maps | edit, asked.size, asked.canvas)
        arrays |= editing.resolve_small(config, upsample, asked.size)
        prompts, labels = request.resolve_conditions(config, prompts, labels, self.label_names)
        request.warn_of_untrained(config, prompts, labels)
        layouts, vectors = request.resolve_layouts(config, layouts), request.resolve_vectors(config, vectors)
        turned = editing.resolve_variation(variation, variation_seed)
        if turned and noise is not None:
            raise UserError("noise: variations turn the noise of the seed; leave noise or variation out")
        arrays |= turned or drawing.given_noise(self, asked, noise)
        given = [prompts, labels, layouts, vectors, asked.guidance_scale, *arrays.values()]
        number = max(len(x) for x in given if x is not None) if num_samples is None else num_samples
        for name, value in (("num_samples", number), ("batch_size", 1 if batch_size is None else batch_size)):
            if value < 1:
                raise UserError(f"{name}={value} must be 1 or more")
        if negative_prompts is not None:
            arrays["negative_tokens"] = self._negative_tokens(negative_prompts)
        conditions = self.conditions(prompts, labels, number, layouts, settings_lib.patches(config, asked), vectors)
        nothing_given = prompts is None and labels is None and layouts is None and vectors is None
        if nothing_given and negative_prompts is None and weak is None:  # nothing to be guided to
            asked = dataclasses.replace(asked, guided=False)
        drawing.check_weak(self, weak)
        job = drawing.Job(
            arrays=arrays, masked="mask" in edit, variation_seed=variation_seed, same_noise=same_noise,
            upsample_scale=upsample_scale, weak=weak, correction=correction, frames=frames, report=report)
        positions = np.arange(number) if only is None else np.asarray(only, np.int64)
        return drawing.batches(self, asked, conditions, positions, batch_size, job)

    def sample_arrays(self, conditions: Mapping[str, np.ndarray], *, seed: int = 0) -> drawing.Samples:
        """`sample` with the settings of ``config.sampling``, for conditions as a batch of training holds them.

        Args:
          conditions: one row for each picture, of every field that `request.condition_fields` and `request.map_fields`
            name: tokens, layout int32 (n, l); label int32 (n,); and what `request.resolve_maps` returns.
        """
        maps = {name: conditions[name] for name in request.map_fields(self.config)}
        asked = settings_lib.resolve(self.config, seed=seed, size=settings_lib.size_of_maps(self.config, maps))
        positions = np.arange(len(next(iter(conditions.values()))))
        return drawing.joined(drawing.batches(self, asked, conditions, positions, None, drawing.Job()))

    def _negative_tokens(self, prompts: str | Sequence[str]) -> np.ndarray:
        if "tokens" not in request.condition_fields(self.config):
            raise UserError(f"this model takes no negative_prompts; {request.takes(self.config)}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        return self.vocabulary.encode(prompts, self.config.conditioning.text.max_length)

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

    @property
    def conditioning(self) -> programs.Conditioning:
        options = self.config.conditioning
        return programs.Conditioning(options.crossattn, bool(options.label), options.concat)

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
        return programs.denoise(self.params, z_t, t, dict(condition), models=self.models, options=self.conditioning)
