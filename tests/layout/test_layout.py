"""The order of the code: which package, folder and module may import which.

`python tests/layout/graph.py --arrows` prints the imports as they are.
"""

import ast
import functools
import subprocess
import sys

import pytest

from tests.layout.graph import (
    PACKAGES,
    ROOT,
    circles,
    find_modules,
    import_graph,
    imported_names,
    is_command,
    parts,
)

# A house for each package, top floor first. A line is a floor; what stands on it (modules and
# folders) imports only from the lines below it, never from its own. COMMANDS are all modules at
# the top of a package that run as `python -m`.
COMMANDS = "COMMANDS"
FLOORS = {
    "mlx_snapgen": f"""
        {COMMANDS}
        pipeline
        open_model public_pipeline
        quantize public pipeline_base measure profile
        draw teachers
        checkpoint
        lora prompt_check
        networks metadata cli
        inputs
        settings tensor_files
        fitting
        picture_files presets
        formats
        config public_config json_values files pictures reading sampling
        alpha description semantics vocabulary
        errors
        _blas _interrupts _kernel_cache _terminal _version
    """,
    "mlx_snapgen.networks": """
        clip efficient_dit flux2 minit2i qwen_image z_image
        joint_attention
        attention autoencoders text_encoders
        cached
        base elastic layers rope
        products
        exponentials parallel
    """,
    "mlx_snapgen.networks.autoencoders": """
        registry
        flux2 colors
        convolutional dc_ae kl pixels qwen_image taehv
        layerwise
        residual semantics
        base blocks tiling
    """,
    "mlx_snapgen.networks.text_encoders": """
        clip gemma qwen t5
        sentencepiece
        base
    """,
    "mlx_snapgen.checkpoint": """
        model memory
        text_encoders clip_towers
        clip language_models t5 config
        module hub runs
    """,
    "mlx_snapgen.lora": """
        files
        adapters layouts peft
        things
    """,
    "mlx_snapgen.quantize": """
        sensitivity runtime
        palettes
    """,
    "mlx_snapgen.public": """
        first_use
        estimate
        files
        description
        teachers
        convert
        kinds
        keys
        source
        layouts
        keymap stream
    """,
    "mlx_snapgen.teachers": """
        checkpoint draw memory
        folder
        flow
        base config
    """,
    "mlx_snapgen.cli": """
        interactive
        generate_options
        options notices prompts_file
    """,
    "train": f"""
        {COMMANDS}
        setup
        options
        evaluation preparation
        loop
        objectives
        data
    """,
    "train.options": """
        autoencoder evaluate kdmd lora new palettes prepare supernetwork
        data
        common
    """,
    "train.setup": """
        kdmd supernetwork
        data
    """,
    "train.preparation": """
        work
        drawn pictures
        encoders report
    """,
    "train.data": """
        public
        open distillation prior trajectories
        encoded
        pictures prepared
        crops simulation index shards
        conditions selection
        stickers
        imagefolder mixture prompts
        readers
        headers source
        streams order text
    """,
    "train.data.readers": """
        parquet joined
        tars
        folder
        captions
    """,
    "train.data.stickers": """
        known_things own_thing
        model
        source
        render
        semantics strangers
        scenes
        captions
        vocabulary
    """,
    "train.objectives": """
        kdmd
        distillation finetune flow
        elastic palettes
        projectors autoencoder
        base losses
    """,
    "train.loop": """
        speed
        trainer autoencoder
        roles teacher
        run plot step
        optimizer
        assemble checkpoint config distributed palettes principal_components warm_start
    """,
    "train.evaluation": """
        drift measures palettes prompt_lists public stickers
        models
        previews validation
        clip_measures estimate memory reconstruction
    """,
    "convert": f"""
        {COMMANDS}
        peers
        coreml parity
        pytorch
        mil report pickles
        options libraries
    """,
    "convert.coreml": """
        __main__
        export compare minit2i
        options packages
        package
    """,
    "convert.mil": """
        interpreter
        execution summary
        ops program
        products weights
    """,
    "apps": """
        desktop server ios
        worker
    """,
    "apps.worker": """
        client
        engine
        messages
    """,
}

# What a package may import besides itself, the standard library and small libraries.
FORBIDDEN = {
    "mlx_snapgen": {"train", "convert", "apps", "tests", "torch", "coremltools"},
    "train": {"convert", "apps", "tests", "torch", "coremltools"},
    "apps": {"convert", "train", "tests", "torch", "coremltools"},
    "convert": {"train", "apps", "tests"},
}

# Importing these, also all that they import, leaves mlx out.
NO_MLX = (
    "mlx_snapgen",
    "mlx_snapgen.cli.options",
    "mlx_snapgen.config",
    "mlx_snapgen.description",
    "mlx_snapgen.errors",
    "mlx_snapgen.files",
    "mlx_snapgen.fitting",
    "mlx_snapgen.metadata",
    "mlx_snapgen.picture_files",
    "mlx_snapgen.presets",
    "mlx_snapgen.reading",
    "mlx_snapgen.settings",
    "apps.worker.client",
    "apps.worker.messages",
    "apps.desktop.window",
    "apps.server.__main__",
)

# What the processes that show pictures may import of the worker: never its engine.
FRONT_ENDS = ("apps.desktop", "apps.server")

# Arrows that close a circle on paper only, as they are followed when somebody asks for the name.
LATER = {("mlx_snapgen", "mlx_snapgen.pipeline")}

MODULES = find_modules()
GRAPH = import_graph()


@functools.cache
def syntax(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def commands() -> set[str]:
    return {module for module in MODULES if is_command(syntax(module))}


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package):
    for module in MODULES:
        if module.split(".")[0] == package:
            wrong = {name.split(".")[0] for name, _ in imported_names(syntax(module))}
            wrong &= FORBIDDEN[package]
            assert not wrong, f"{module} imports {wrong}"


@pytest.mark.parametrize("package", FLOORS)
def test_floors(package):
    floor = {}
    for number, line in enumerate(reversed(FLOORS[package].split("\n"))):
        floor |= dict.fromkeys(line.split(), number)
    at_top = {name.removeprefix(f"{package}.") for name in commands()} if COMMANDS in floor else ()
    arrows = parts(GRAPH, package)
    homeless = set(arrows) - set(floor) - set(at_top)
    assert not homeless, f"add {homeless} of {package} to FLOORS"
    gone = set(floor) - set(arrows) - {COMMANDS, "__main__"}
    assert not gone, f"remove {gone} of {package} from FLOORS"
    top = floor.get(COMMANDS)
    wrong = {
        f"{package}: {part} imports {target}"
        for part, targets in arrows.items()
        for target in targets
        if floor.get(part, top) <= floor.get(target, top)
    }
    assert not wrong


def test_no_circles():
    graph = {
        module: {target for target in targets if (module, target) not in LATER}
        for module, targets in GRAPH.items()
    }
    assert not circles(graph)


def test_commands_import_no_commands():
    running = commands()
    wrong = {
        f"{module} imports the command {target}"
        for module in running
        for target in GRAPH[module] & running
    }
    assert not wrong


def test_training_does_not_depend_on_the_stickers():
    """Only commands, what opens data and what scores stickers choose that data source."""
    stickers = ("train.data.stickers", "train.evaluation.stickers")
    wrong = {
        module
        for module, targets in GRAPH.items()
        if any(target.startswith(stickers) for target in targets)
        and not module.startswith((*stickers, "train.options", "train.data.open"))
        and module not in commands()
    }
    assert not wrong


def test_front_ends_do_not_import_the_engine():
    for module in MODULES:
        if module.startswith(FRONT_ENDS):
            assert "apps.worker.engine" not in GRAPH[module], module


@pytest.mark.parametrize("module", NO_MLX)
def test_no_mlx(module):
    if module == "apps.desktop.window":
        pytest.importorskip("tkinter")
    if module == "apps.server.__main__":
        pytest.importorskip("starlette")
    code = f"import {module}, sys; assert 'mlx.core' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr


def test_names_come_from_where_they_are_defined():
    """No module passes on what another one defines, and one __all__ is enough."""
    passed_on = {}
    for module in MODULES:
        tree = syntax(module)
        assigned = {
            node.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        assert "__all__" not in assigned or module == "mlx_snapgen", module
        names = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        passed_on[module] = names - assigned if module != "mlx_snapgen" else set()
    for path in [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]:
        for source, name in imported_names(ast.parse(path.read_text())):
            where = f"{path.relative_to(ROOT)} imports {name} from {source}"
            assert name not in passed_on.get(source, ()), f"{where}, which only imports it"


def test_top_level_is_the_agreed_one():
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in tracked.stdout.splitlines()}
    agreed = {*PACKAGES, "tests", "pyproject.toml", "README.md", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= agreed
