"""What differs between the stages, gathered for the one loop: networks, first state, steps, evaluation, pictures.

`autoencoder` and `diffusion` each return a `Setup`; nothing here trains.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from latent_diffusion import conditions, images, layouts, models, parallel, pipeline, request, settings, sizes, weights
from latent_diffusion.data import loader
from latent_diffusion.diffusion import schedule as schedule_lib
from latent_diffusion.errors import UserError
from latent_diffusion.models.perceptual import LPIPS
from latent_diffusion.training import autoencoder as stage1
from latent_diffusion.training import diffusion as stage2
from latent_diffusion.training import first_stage as first_stage_lib
from latent_diffusion.training import initial, optimizer, previews, text_encoder

Splits = Mapping[str, Any]  # {"train": source, "eval": source}, opened


@dataclasses.dataclass(frozen=True)
class Data:
    """Where batches come from: the opened sets, and what a batch must hold."""

    config: Any
    splits: Splits
    fields: tuple[str, ...]
    vocabulary: conditions.Tokenizer | None = None

    def train(self, start_step: int) -> Iterator[dict]:
        """This process's share of the endless, augmented stream, from a step on, compact as the steps take it."""
        return self._batches("train", start_step=start_step, process_index=jax.process_index(),
                             process_count=jax.process_count(), compact=True)

    def evaluation(self) -> Iterator[dict]:
        """This process's share of one pass over the held-out set, at most ``evaluation.max_batches`` batches."""
        stream = self._batches("eval", process_index=jax.process_index(), process_count=jax.process_count(),
                               compact=True)
        return itertools.islice(stream, self.config.evaluation.max_batches or None)

    def full_batches(self) -> Iterator[dict]:
        """`evaluation` without a padded last batch, unless it is the only one. Equally many in every process."""
        full = len(self.splits["eval"].source) // self.config.training.batch_size
        return itertools.islice(self.evaluation(), max(1, full))

    def held_out(self) -> dict[str, np.ndarray]:
        """A batch of the first ``evaluation.num_images`` held-out examples, in whatever process, as floats."""
        number = min(self.config.evaluation.num_images, len(self.splits["eval"].source))
        return next(self._batches("eval", batch_size=number))

    def _batches(self, split: str, **options: Any) -> Iterator[dict]:
        return loader.batches(self.config, split, vocabulary=self.vocabulary, fields=self.fields,
                              source=self.splits[split], **options)


@dataclasses.dataclass(frozen=True)
class Setup:
    """A stage, ready for the loop. Nothing has been compiled yet, and no weights made but the frozen ones.

    create: makes the state at step 0, on all devices. shapes: its shapes and dtypes. frozen: weights that no step
    updates, on all devices. step: pmapped ``(state, frozen, batch, key) -> (state, metrics)``. evaluate: ``state ->
    {name: number}`` over the held-out set, a collective. pictures: ``state -> {name: Pictures}``, in one process.
    summary: one line from the result of `evaluate`. notes: what to tell the user at the start.
    """

    models: models.Models
    create: Callable[[], Any]
    shapes: Callable[[], Any]
    frozen: dict
    data: Data
    step: Callable
    evaluate: Callable[[Any], dict[str, float]]
    pictures: Callable[[Any], dict[str, previews.Pictures]]
    summary: Callable[[dict[str, float]], str]
    notes: tuple[str, ...] = ()


# --- completing a config ---------------------------------------------------------------------------------------------


def complete_conditioning(config: Any, workdir: epath.Path, source: Any) -> conditions.Tokenizer | None:
    """Stage 2: number of classes and vocabulary from the data (or from the workdir when resuming), written into the
    config. Returns the vocabulary of a text model."""
    if config.stage != "diffusion":
        return None
    options, vocabulary = config.conditioning, None
    for name, things, names in (("segmentation", options.segmentation, source.map_names),
                                ("layout", options.layout, source.object_names)):
        if name in (options.concat, options.crossattn):
            if not names:
                kind = "semantic maps" if name == "segmentation" else "objects with boxes"
                raise UserError(f"conditioning by {name} needs {kind}, but data.source={config.data.source} has none; "
                                "see docs/data.md")
            things.num_classes = things.num_classes or len(names)
            counted = name == "layout" or config.data.source != "tfds"  # maps of TFDS sets need not tell their classes
            if counted and things.num_classes < len(names):
                raise UserError(f"conditioning.{name}.num_classes={things.num_classes} but the data has {len(names)} "
                                "classes; 0 sets it")
    if options.crossattn == "layout":
        if mistakes := layouts.check_options(options.layout):
            raise UserError("; ".join(mistakes))
    if options.label or options.crossattn == "class":
        if not source.label_names:
            raise UserError(f"conditioning needs labels, but data.source={config.data.source} has none; use class "
                            "sub-folders, a set with labels, or conditioning.label=False")
        options.num_classes = options.num_classes or len(source.label_names)
        if options.label and config.model.num_classes not in (0, sizes.label_rows(config)):
            raise UserError(f"model.num_classes={config.model.num_classes} must be {sizes.label_rows(config)}, the "
                            "classes and the null class; 0 sets it")
        if options.num_classes < len(source.label_names):
            raise UserError(f"conditioning.num_classes={options.num_classes} but the data has "
                            f"{len(source.label_names)} classes")
    if options.crossattn == "vectors":
        raise UserError("conditioning.crossattn='vectors' is for imported models: no data here has vectors to train on")
    if options.crossattn == "text":
        if source.captions is None:
            raise UserError(f"conditioning.crossattn='text' needs captions, but data.source={config.data.source} has "
                            "none; add a captions.jsonl, or choose another conditioning")
        text_encoder.check(config, workdir)
        vocabulary = tokenizer(options.text, workdir, source.captions)
        options.text.vocab_size = vocabulary.size
    return vocabulary


def tokenizer(options: Any, workdir: epath.Path, captions: Any) -> conditions.Tokenizer:
    """The tokenizer of the workdir when resuming, that of the given file, or else one learned from the captions."""
    if (saved := conditions.saved_tokenizer(workdir, options.kind)) is not None:
        return saved
    if options.vocab:
        return conditions.TOKENIZERS[options.kind](options.vocab)
    if options.kind == "clip":
        raise UserError("conditioning.text.kind=clip needs its tokenizer: a folder with vocab.json and merges.txt, or "
                        "bpe_simple_vocab_16e6.txt.gz, as --config.conditioning.text.vocab=PATH")
    return conditions.train_vocabulary(captions, options.vocab_size)


# --- stage 1 ---------------------------------------------------------------------------------------------------------


def autoencoder(config: Any, workdir: epath.Path, splits: Splits, vocabulary: None) -> Setup:
    """Stage 1, ready for the loop."""
    del vocabulary
    networks = models.build(config)
    tx = (optimizer.create(config), optimizer.create(config, rate_factor=config.optimizer.disc_factor))
    perceptual = config.training.loss.perceptual
    frozen = parallel.replicate({} if perceptual == "none" else {"lpips": weights.load_lpips(perceptual)})
    data, key = Data(config, splits, ("image",)), jax.random.key(config.seed)
    first_step = parallel.pmap_step(stage1.create_state, models=networks, tx=tx, config=config)
    step = parallel.pmap_step(stage1.train_step, models=networks, schedule=None, tx=tx, config=config)
    eval_step = parallel.pmap_evaluate(stage1.eval_step, models=networks, config=config)

    def create() -> Any:
        state = first_step(None, frozen, parallel.shard(next(data.train(0))), key)[0]
        return parallel.replicate(beginning.put_into(parallel.to_host(state))) if beginning else state

    def shapes() -> Any:
        local = (jax.local_device_count(), config.training.batch_size // jax.device_count())
        size, channels = config.data.image_size, config.data.channels
        batch = {"image": jax.ShapeDtypeStruct((*local, size, size, channels), np.uint8),
                 "index": jax.ShapeDtypeStruct(local, np.int32)}
        if perceptual != "none":  # it has a smallest picture
            one = jax.ShapeDtypeStruct((1, size, size, channels), np.float32)
            jax.eval_shape(LPIPS(net=perceptual).init, key, one, one)
        return jax.eval_shape(first_step, None, frozen, batch, key)[0]

    beginning = initial.load(config, workdir, shapes())

    def evaluate(state: Any) -> dict[str, float]:
        sums = sum_over_batches(eval_step, stage2.sampling_params(state.params, state.ema_params), frozen,
                                data.evaluation(), key)
        means = {name: value / sums["count"] for name, value in sums.items() if name != "count"}
        std = max(means.pop("latent_square") - means["latent_mean"] ** 2, 0.0) ** 0.5
        return means | {"latent_std": std, "images": sums["count"]}

    @jax.jit
    def reconstruct(params: Any, x: jax.Array) -> jax.Array:
        return stage1.reconstruct_mode(params, x, models=networks, config=config)[0]

    def pictures(state: Any) -> dict[str, previews.Pictures]:
        x = data.held_out()["image"]
        params = stage2.sampling_params(state.params, state.ema_params)
        y = np.asarray(reconstruct(parallel.to_host(params["autoencoder"]), x))
        pairs = np.stack([images.to_uint8(x), images.to_uint8(y)], axis=1)
        return {"reconstructions": previews.Pictures(pairs.reshape(-1, *pairs.shape[2:]))}

    def summary(result: dict[str, float]) -> str:
        lpips = "".join(f", LPIPS ({name[6:]}) {value:.4f}" for name, value in result.items() if name[:6] == "lpips_")
        return f"held-out PSNR {result['psnr']:.2f} dB{lpips}, latents' std {result['latent_std']:.3f}"

    return Setup(networks, create, shapes, frozen, data, step, evaluate, pictures, summary)


# --- stage 2 ---------------------------------------------------------------------------------------------------------


def diffusion(config: Any, workdir: epath.Path, splits: Splits, vocabulary: conditions.Tokenizer | None) -> Setup:
    """Stage 2, ready for the loop; copies the first stage into the workdir the first time."""
    networks, schedule, tx = models.build(config), schedule_lib.from_config(config.diffusion), optimizer.create(config)
    key, fields = jax.random.key(config.seed), request.condition_fields(config)
    maps = tuple(field for field in request.map_fields(config) if field != "image")
    opened = splits["train"]
    names = dict(label_names=opened.label_names, object_names=opened.object_names)
    asked = previews.conditions_to_draw(config, splits["train"])
    settings.resolve(config, seed=config.seed)
    request.resolve_conditions(config, asked.get("prompts"), asked.get("labels"), opened.label_names)

    @jax.jit
    def create_state() -> Any:
        return stage2.create_state(key, models=networks, tx=tx, config=config)

    # Networks and weights that do not fit the config say so before anything is copied.
    beginning = initial.load(config, workdir, jax.eval_shape(create_state))
    null, encoder = request.null_conditions(config, vocabulary), text_encoder.copy_once(config, networks, workdir)
    first_stage, origin = first_stage_lib.copy_once(config, workdir)
    frozen = parallel.replicate({"first_stage": first_stage, "null": null, "conditioner": encoder})
    if config.first_stage.cache:
        splits = first_stage_lib.cached_sources(
            config, networks, frozen, splits, tuple({"tokens": "caption"}.get(name, name) for name in fields))
    data = Data(config, splits, ("image", *fields, *maps), vocabulary)
    step = parallel.pmap_step(stage2.train_step, models=networks, schedule=schedule, tx=tx, config=config)
    eval_step = parallel.pmap_evaluate(stage2.eval_step, models=networks, schedule=schedule, config=config)

    def create() -> Any:
        state, factor = create_state(), config.first_stage.scale_factor
        if beginning:
            state, factor = beginning.put_into(parallel.to_host(state)), factor or beginning.scale_factor
        factor = factor or first_stage_lib.measure_scale_factor(config, networks, frozen, data.train(0))
        return parallel.replicate(state.replace(scale_factor=np.float32(factor)))

    def shapes() -> Any:
        return jax.eval_shape(create_state)

    def evaluate(state: Any) -> dict[str, float]:
        joined = stage2.sampling_params(state.params, state.ema_params)
        held = {"params": joined, "scale_factor": state.scale_factor}
        sums = sum_over_batches(eval_step, held, frozen, data.full_batches(), key)
        return {name: value / sums["count"] for name, value in sums.items() if name != "count"}

    def pictures(state: Any) -> dict[str, previews.Pictures]:
        params = stage2.with_frozen(stage2.sampling_params(state.params, state.ema_params), frozen)
        params["first_stage"] = frozen["first_stage"]
        ldm = pipeline.LatentDiffusion(
            config=config, models=networks, schedule=schedule, params=parallel.of_this_process(params),
            vocabulary=vocabulary,
            scale_factor=float(parallel.to_host(state.scale_factor)), step=int(parallel.to_host(state.step)), **names)
        return {"samples": previews.draw(ldm, asked, data.held_out() if maps or "layout" in fields else {})}

    def summary(result: dict[str, float]) -> str:
        return f"held-out loss {result['loss_simple']:.4f} ({'EMA' if config.ema.decay > 0 else 'raw'} weights)"

    notes = (f"first stage: {origin['source']}, step {origin['step']}, as copied into {workdir}",) if origin else ()
    if encoder:
        size = sum(x.size for x in jax.tree.leaves(encoder))
        notes += (f"text encoder: {size:,} parameters, frozen, as copied into {workdir}",)
    return Setup(networks, create, shapes, frozen, data, step, evaluate, pictures, summary, notes)


def sum_over_batches(step: Callable, params: Any, frozen: dict, stream: Iterator[dict], key: Any) -> dict[str, float]:
    """Adds up a pmapped evaluation's sums over a stream."""
    totals: dict[str, float] = {}
    for batch in stream:
        sums = parallel.to_host(step(params, frozen, parallel.shard(batch), key))
        totals = {name: totals.get(name, 0.0) + float(value) for name, value in sums.items()}
    return totals
