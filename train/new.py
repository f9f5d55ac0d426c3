"""Write an untrained model folder: `python -m train.new OUT --preset NAME ...`.

The transformer has random weights. The autoencoder is copied. Public text encoders are used from
their source and are not trained; `--tokenizer` adds one that is trained with the model. The latent
channels and text widths of the transformer follow from these parts. The command prints the sizes of
all parts, the memory that training needs, and the commands that follow.
"""

import shlex
from pathlib import Path

import mlx.core as mx

from mlx_snapgen.checkpoint.model import Components
from mlx_snapgen.cli.notices import announce
from mlx_snapgen.errors import run_command
from mlx_snapgen.networks.efficient_dit import count_parameters
from mlx_snapgen.settings import held_widths
from train.data.text import is_trained
from train.evaluation.memory import training_memory
from train.loop.assemble import (
    check_converted,
    count_weights,
    new_model,
    own_encoder,
    public_encoder,
    save_model,
)
from train.loop.autoencoder import load_autoencoder
from train.loop.config import TrainingConfig
from train.loop.run import find_folder
from train.options.new import parse, statistics_source

SIDES = (256, 512, 1024)
BATCH_SIZES = (1, 4, 16, 64)


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


def print_commands(model: Path, resolution: int) -> None:
    """Print the commands that follow."""
    data, run, trained = (f"{model}-{part}" for part in ("data", "run", "trained"))
    commands = (
        (
            "train.prepare",
            "PICTURES",
            "--output",
            data,
            "--model",
            model,
            "--resolution",
            resolution,
        ),
        ("train.flow", "--model", model, "--data", data, "--run-dir", run),
        ("train.export", "--run", run, "--output", trained),
        ("mlx_snapgen.generate", "PROMPT", "--model", trained),
    )
    print("next, with a folder of captioned PICTURES:")
    for words in commands:
        print("python -m " + shlex.join(map(str, words)))


def main() -> None:
    args = parse()
    folder = find_folder(args.autoencoder)
    check_converted(folder)
    mx.random.seed(args.seed)
    preset = args.preset
    is_run = not (folder / "config.json").is_file()
    source = statistics_source(args, folder) if is_run else None
    with announce("loading the text encoders and the autoencoder ..."):
        encoders = [public_encoder(source) for source in args.text_encoders]
        if args.tokenizer:
            encoders.append(own_encoder(args.tokenizer, preset.own))
        autoencoder = load_autoencoder(folder, source)
    components = new_model(
        preset.transformer,
        autoencoder,
        text_encoders=encoders,
        name=args.output.name,
        image_size=preset.size,
        sampler=preset.sampler,
        unconditional=preset.unconditional,
    )
    with announce(f"writing {args.output} ..."):
        save_model(args.output, components)
    print_sizes(components)
    print_memory(components)
    print_commands(args.output, min(preset.size))


if __name__ == "__main__":
    run_command(main)
