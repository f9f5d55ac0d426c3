"""Write an untrained model folder: `python -m train.new OUT --preset NAME ...`.

The transformer has random weights, or with `--weights-from` those of a model where they fit. The
autoencoder is copied. Public text encoders are used from their source and are not trained;
`--tokenizer` adds one that is trained with the model. The latent channels and text widths of the
transformer follow from these parts. The command prints the sizes of all parts, the memory that
training needs, and the commands that follow.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_snapgen.checkpoint.model import Components, load_pretrained
from mlx_snapgen.checkpoint.text_encoders import encoder_names
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.errors import run_command
from mlx_snapgen.files import expanded
from mlx_snapgen.networks.efficient_dit import count_parameters
from mlx_snapgen.settings import held_widths
from train.data.open import is_prepared, is_stickers, is_there
from train.data.prepared import Prepared
from train.data.text import is_trained
from train.evaluation.memory import training_memory
from train.loop.assemble import (
    check_converted,
    check_sides,
    count_weights,
    new_model,
    own_encoder,
    public_encoder,
    round_autoencoder,
    save_model,
)
from train.loop.autoencoder import (
    check_autoencoder_run,
    config_of,
    keep_statistics,
    kept_statistics,
    load_autoencoder,
)
from train.loop.config import TrainingConfig
from train.loop.run import find_folder
from train.loop.warm_start import take_weights
from train.options.common import check_outside
from train.options.new import (
    check_autoencoder,
    check_columns,
    parse,
    pictures_of,
    statistics_source,
)

SIDES = (256, 512, 1024)
BATCH_SIZES = (1, 4, 16, 64)
PICTURES = "PICTURES"
"""In the commands that follow: a place for the user's pictures, if they are not known."""
TEACHER = "TEACHER"
PROMPT = "a prompt"


def print_sizes(components: Components) -> None:
    """Print the weights of each part, those of the transformer for each width."""
    rows = []
    transformer, widths = components.config.transformer, held_widths(components.config)
    for width in widths if len(widths) > 1 else ():
        count = count_parameters(transformer.standalone(width.share))
        rows.append((f"transformer, {width.name}", count, "a part of the next line"))
    rows.append(("transformer", count_weights(components.transformer), "trained"))
    for i, encoder in enumerate(components.text_encoders):
        config = encoder.config
        how = f"{config.kind}, " + (f"from {config.source}" if config.source else "trained")
        rows.append((f"text encoder {i}", count_weights(encoder), how))
    autoencoder = components.autoencoder
    rows.append(("autoencoder", count_weights(autoencoder), autoencoder.config.kind))
    for name, count, how in rows:
        print(f"{name:<20}{count / 1e6:12.2f}M weights   {how}")


def print_memory(components: Components) -> None:
    """Print the memory that a step of train.flow needs, with and without `--save-memory`."""
    config, encoders = components.config, components.text_encoders
    own = sum(count_weights(e) for e in encoders if is_trained(e.config))

    def needed(side: int, batch_size: int, save_memory: bool) -> str:
        latents = side // config.autoencoder.downsampling
        memory = training_memory(
            config.transformer,
            latents=(latents, latents),
            batch_size=batch_size,
            save_memory=save_memory,
            sub_networks=int(len(config.transformer.widths) > 1),
            text_tokens=sum(e.config.max_length for e in encoders),
            text_parameters=own,
            compute_bytes=TrainingConfig(1).dtype.size,
        )
        return f"{memory / 1e9:.1f}"

    print("memory of a training step in GB (with --save-memory):")
    print(" " * 10 + "".join(f"{f'--batch-size {n}':>22}" for n in BATCH_SIZES))
    for side in sorted({*SIDES, min(config.image_size)}):
        cells = [f"{needed(side, n, False)} ({needed(side, n, True)})" for n in BATCH_SIZES]
        print(f"{f'{side} px':<10}" + "".join(f"{cell:>22}" for cell in cells))


def next_commands(
    model: Path,
    sources: Sequence[str],
    *,
    resolution: int,
    is_elastic: bool,
    prepared: bool = False,
    captions: Sequence[str] = (),
    template: str | None = None,
) -> dict[str, list[list[str]]]:
    """The commands that follow: heading -> their words.

    Args:
        sources: the user's SOURCEs.
        resolution: of the model's pictures, in pixels.
        is_elastic: whether it has several widths.
        prepared: whether the sources are folders of `train.prepare` for this model.
        captions: the columns to train on, or none for the default one.
        template: see `PictureFolderRecords`.
    """

    def named(part: str, suffix: str = "") -> str:
        return f"{model}-{part}{suffix}"

    rendered = all(map(is_stickers, sources))
    columns = ["--captions", *captions] if captions and not rendered else []
    # Of several columns in a prepared set, training uses the first unless they are named.
    chosen = columns if len(captions) > 1 or prepared else []

    def data(
        pictures: Sequence[str], name: str, *options: str
    ) -> tuple[list[list[str]], list[str]]:
        """The commands that prepare the data, and how training names it."""
        size = ["--resolution", str(resolution)]
        command = ["train.prepare", *pictures, "--output", name, "--model", str(model), *size]
        named_folders = [] if template is None else ["--caption-template", template]
        return [[*command, *columns, *named_folders, *options]], [name, *chosen]

    if rendered or prepared:
        prepare, used = [], [*sources, *chosen]
    else:
        prepare, used = data(sources, named("data"))
    trained, four, teacher = named("trained"), named("4"), ["--teacher", TEACHER]
    few_step, student = (named(part, ".safetensors") for part in ("few-step", "kdmd"))
    kdmd = ["train.kdmd", "--model", trained, "--data", *used]
    full = ["--model-widths", "full"]
    widths = [] if is_elastic else full
    measure = ["train.evaluate", "--model", trained, "--data", *used]
    if rendered:
        prepare_kd, used_kd = [], used
    else:
        # A teacher may have other latents: the set is made of the pictures again.
        pictures = [PICTURES] if prepared else sources
        prepare_kd, used_kd = data(pictures, named("kd-data"), *teacher)
    kd = ["train.kd", "--model", str(model), *teacher]
    return {
        "next": [
            *prepare,
            ["train.flow", "--model", str(model), "--data", *used, "--run-dir", named("run")],
            ["train.export", "--run", named("run"), "--output", trained],
            [*measure, "--output", named("measures")],
            ["mlx_snapgen.generate", PROMPT, "--model", trained],
        ],
        "then, to draw in four steps": [
            [*kdmd, *full, "--run-dir", named("few-step"), "--output", few_step],
            [
                *(*kdmd, *widths, "--few-step-lora", few_step),
                *("--run-dir", named("kdmd"), "--output", student),
            ],
            ["train.export", "--model", trained, "--few-step-lora", student, "--output", four],
            ["mlx_snapgen.generate", PROMPT, "--model", four],
        ],
        f"or first with a {TEACHER}, which may be a public model": [
            *prepare_kd,
            [*kd, "--data", *used_kd, "--run-dir", named("kd")],
            ["train.export", "--run", named("kd"), "--output", named("kd-trained")],
        ],
    }


def print_commands(model: Path, sources: Sequence[str], **of_model: Any) -> None:
    """Print `next_commands`."""
    for heading, commands in next_commands(model, sources, **of_model).items():
        print(f"{heading}:")
        for words in commands:
            print("python -m " + shlex.join(words))


def main() -> None:
    args = parse()
    folder = find_folder(args.autoencoder)
    check_converted(folder)
    is_run = not (folder / "config.json").is_file()
    preset = args.preset
    if is_run:
        check_autoencoder_run(folder)
    # Before text encoders are fetched and latents measured, which takes minutes.
    autoencoder = None if is_run else load_autoencoder(folder, None)
    config = config_of(folder) if autoencoder is None else autoencoder.config
    check_autoencoder(preset, config)
    check_sides(preset.size, config.downsampling * preset.transformer.patch_size * 2)
    sources = [spec for spec in pictures_of(args, folder) if is_there(spec)]
    check_outside("--output" if args.out is None else "OUT", args.output, sources=sources)
    check_columns(args, sources)
    mx.random.seed(args.seed)
    measured = is_run and kept_statistics(folder) is None
    source = statistics_source(args, folder) if measured else None
    with announce("loading the text encoders ..."):
        encoders = [public_encoder(source) for source in args.text_encoders]
        if args.tokenizer:
            encoders.append(own_encoder(args.tokenizer, preset.own))
    if autoencoder is None:
        autoencoder = load_autoencoder(folder, source)
    prepared = bool(sources) and all(map(is_prepared, sources))
    for spec in sources if prepared else ():
        Prepared(expanded(spec)).check_autoencoder(autoencoder)
    if preset.round_autoencoder:
        round_autoencoder(autoencoder)
    components = new_model(
        preset.transformer,
        autoencoder,
        text_encoders=encoders,
        name=args.output.name,
        image_size=preset.size,
        sampler=preset.sampler,
        unconditional=preset.unconditional,
    )
    if args.start is not None:
        configs = args.start.config.text_encoders
        pairs = zip(encoder_names(configs), configs, strict=True)
        names = [name for name, config in pairs if is_trained(config)]
        with announce(f"loading {args.weights_from} ..."):
            taken, total = take_weights(
                components, load_pretrained(args.start, text_encoders=names)
            )
        print(f"{taken / total:.0%} of the weights to train are those of {args.weights_from}")
    with announce(f"writing {args.output} ..."):
        save_model(args.output, components)
    if measured:
        keep_statistics(folder, autoencoder.config)
    print_sizes(components)
    print_memory(components)
    print_commands(
        args.output,
        sources if len(sources) == len(pictures_of(args, folder)) > 0 else [PICTURES],
        resolution=min(preset.size),
        is_elastic=len(held_widths(components.config)) > 1,
        prepared=prepared,
        captions=args.captions or (),
        template=args.caption_template,
    )


if __name__ == "__main__":
    run_command(main)
