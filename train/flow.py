"""Train an elastic model by flow matching: `python -m train.flow --model MODEL --data DATA ...`.

MODEL is the folder of an untrained model (`train.new`), or of a trained one to train further. Every
step runs the full network and one sampled sub-network on the same noisy latents (SnapGen++ section
3.2): both learn the velocity (eq. 4), the sub-network also learns from the full one (eq. 5), and
the two gradients are scaled to the same norm before they are added. A text encoder of the model's
own is trained too; public ones are frozen.

To train in stages of growing resolution, run the command once for each, with `--init-from` the run
of the stage before.

`--mask-ratio` adds EDT's masking training (arXiv 2410.23788): tokens are masked before the Middle
stage, which must infer them from the others. EDT adds the losses of a pass with all tokens and of a
masked pass. Here one half of a batch is masked and the other is not. The two losses have the same
weights, at half the cost, but use different pictures.
"""

import mlx.core as mx

from mlx_snapgen.errors import UserError, run_command
from train.loop.run import find_folder, start_from
from train.loop.trainer import Trainer
from train.objectives.elastic import TextToLatents
from train.objectives.flow import Flow
from train.options import supernetwork as options
from train.options.common import add_number, check_at_least
from train.setup import supernetwork as setup
from train.setup.data import open_source


def main() -> int:
    parser = options.new_parser("python -m train.flow", "Train an elastic model on pictures.")
    add_number(
        parser,
        "--mask-ratio",
        0.0,
        "share of tokens to mask before the Middle stage, in half of the pictures; the EDT paper "
        "uses 0.45",
    )
    add_number(
        parser,
        "--distillation-weight",
        1.0,
        "weight of the loss between a sub-network and the full network; the loss against the "
        "data has weight 1",
    )
    args = parser.parse_args()
    check_at_least(args, 0, "distillation_weight")
    if not 0 <= args.mask_ratio < 1:
        raise UserError(f"--mask-ratio is {args.mask_ratio}; it must be at least 0 and below 1")
    folder = options.check(args)
    start = args.init_from and find_folder(args.init_from)
    source = open_source(args, folder.config)

    mx.random.seed(args.seed)
    components = setup.load_model(args, folder, source)
    model = TextToLatents.of(components)
    autoencoder = components.autoencoder
    if start:
        start_from(model, start)
    model.transformer.checkpoint_blocks(args.save_memory)
    batches = setup.make_batches(args, source, autoencoder, model=model)
    own = {"mask_ratio": args.mask_ratio, "distillation_weight": args.distillation_weight}
    setup.claim_run(args, source, folder, components=components, trained=model, options=own)
    setup.print_passes(args, source)
    weights = setup.weights_of(args, batches, autoencoder)
    trainer = Trainer(
        model,
        Flow(args.mask_ratio, args.distillation_weight, weights),
        batches=batches,
        config=options.training_config(args),
        run_dir=args.run_dir,
        arguments=setup.step_arguments(args, folder.config),
        validate=setup.make_validation(args, source, autoencoder, model=model),
    )
    trainer.run()
    return trainer.exit_code


if __name__ == "__main__":
    run_command(main)
