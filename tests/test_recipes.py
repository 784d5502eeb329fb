"""Recipes: the shipped ones are what their comments say, values arrive as written, and a mistake is one line."""

import dataclasses
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from modeling_nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from modeling_nanogpt.sources import choose_config
from modeling_nanogpt.training.starting import given_shape
from support import ROOT
from support.tiny_run import train
from train_accelerate import RECIPES, DataArguments, ModelArguments, RunArguments, parse_arguments

TABLE = ROOT / "docs" / "recipes.md"
ALL_ARGUMENTS = (ModelArguments, DataArguments, RunArguments)
KNOBS = [field.name for arguments in ALL_ARGUMENTS for field in dataclasses.fields(arguments)]
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))
# the shapes of OpenAI's models, which some recipes start from: layers, heads, width
GPT2 = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}
SHAKESPEARE_CHARACTERS, SHAKESPEARE_TRAIN = 65, 1_003_854  # nanoGPT's own count: vocabulary, characters to train on


def resolve(*argv):
    """Every knob with its value, as the trainer reads a command line."""
    knobs = {}
    for arguments in parse_arguments([str(word) for word in argv]):
        knobs |= dataclasses.asdict(arguments)
    return SimpleNamespace(**knobs)


def shipped(name):
    return RECIPES / f"{name}.yaml"


def text_of(name):
    return shipped(name).read_text(encoding="utf-8")


def comments_of(name):
    return "\n".join(line.split("#", 1)[1] for line in text_of(name).splitlines() if "#" in line)


def number_of(words):
    """`16,384` or `1.5M` as a number, and half a unit of its last digit."""
    digits, unit = re.fullmatch(r"([\d,.]+)([MB]?)", words).groups()
    scale = {"": 1, "M": 1e6, "B": 1e9}[unit]
    decimals = len(digits.partition(".")[2])
    return float(digits.replace(",", "")) * scale, 0.5 * scale / 10**decimals


def build_model(name):
    """The model of a recipe, without weights, and with the vocabulary that the trainer would give it."""
    model_args, data_args, _ = parse_arguments([str(shipped(name))])
    config = choose_config(given_shape(vars(model_args)), None)
    if model_args.init_from != "scratch":
        layers, heads, width = GPT2[model_args.init_from.removeprefix("openai-community/")]
        config = NanoGPTConfig(vocab_size=50_257, n_layer=layers, n_head=heads, n_embd=width, bias=True)
        with torch.device("meta"):
            return NanoGPTForCausalLM(config)
    tokens = {"bpe": data_args.vocab_size, "gpt2": 50_257, "char": SHAKESPEARE_CHARACTERS + 256 + 1}[
        data_args.tokenizer
    ]
    config.vocab_size = -(-tokens // 64) * 64
    with torch.device("meta"):
        return NanoGPTForCausalLM(config)


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe of this text; returns its path."""

    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write


@pytest.fixture
def refusal(capsys):
    """Parse a command line that must be refused. Returns the line that says why."""

    def refuse(*argv):
        with pytest.raises(SystemExit) as stop:  # anything else would be a traceback
            parse_arguments([str(word) for word in argv])
        shown = capsys.readouterr()
        assert stop.value.code == 2
        assert shown.out == ""
        (line,) = shown.err.splitlines()  # by default, argparse would print its usage first
        program, error, message = line.partition(": error: ")
        assert error and "usage" not in line
        return message

    return refuse


# ---------------------------------------------------------------------------------------------------------------------
# The recipes of hub_configs/


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_parses_and_its_shape_is_a_model(name):
    knobs = resolve(shipped(name))
    assert knobs.out_dir == f"out/{name}" and knobs.corpus is not None
    config = build_model(name).config
    for key in ("block_size", "n_layer", "n_head", "n_embd"):
        assert getattr(knobs, key) in (getattr(config, key), None if knobs.init_from != "scratch" else ...)


def test_recipes_that_share_a_data_dir_have_the_same_data():
    data = {}
    keys = ("corpus", "corpus_config", "tokenizer", "val_fraction", "vocab_size")
    for name in SHIPPED:
        knobs = resolve(shipped(name))
        data.setdefault(knobs.data_dir, set()).add(tuple(getattr(knobs, key) for key in keys))
    assert all(len(kinds) == 1 for kinds in data.values())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_trains(name, tmp_path, run):
    """Two steps of a small model, on a text in place of the recipe's."""
    knobs = resolve(shipped(name))
    flags = yaml.safe_load(text_of(name)) | {"tokenizer": "char", "max_iters": 2, "eval_interval": 2}
    flags |= {"batch_size": 2, "gradient_accumulation_steps": 2, "eval_tokens": 64, "num_proc": 1, "val_fraction": 0.1}
    flags |= {"always_save_checkpoint": True}
    if knobs.init_from == "scratch":
        flags |= {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
    else:
        flags["init_from"] = run.out_dir
    flags = {key: value for key, value in flags.items() if not key.startswith("corpus")} | {
        "data_dir": tmp_path / "data"
    }
    trained = train(tmp_path, **flags)
    if knobs.eval_only:
        assert not trained.out_dir.exists()
    else:
        assert len(trained.val_losses) == 2 and (trained.out_dir / "model.safetensors").exists()


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_short_and_says_how_to_run_it(name):
    assert 8 <= len(text_of(name).splitlines()) <= 30
    assert "train_accelerate.py" in comments_of(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_names_each_knob_as_it_is_spelled(name):
    assert set(yaml.safe_load(text_of(name))) <= set(KNOBS)


@pytest.mark.parametrize("name", [name for name in SHIPPED if "A step is" in text_of(name)])
def test_the_arithmetic_in_a_recipe_is_that_of_its_knobs(name):
    knobs, comments = resolve(shipped(name)), comments_of(name)
    factors = re.search(r"A step is ([\d,]+) \* ([\d,]+) \* ([\d,]+) = ([\d,]+) tokens", comments).groups()
    *factors, product = (number_of(words)[0] for words in factors)
    assert factors == [knobs.gradient_accumulation_steps, knobs.batch_size, knobs.block_size or 1024]
    assert product == factors[0] * factors[1] * factors[2]
    steps, tokens = re.search(r"([\d,]+) steps are ([\d.]+[MB]) tokens", comments).groups()
    assert number_of(steps)[0] == knobs.max_iters
    value, precision = number_of(tokens)
    assert knobs.max_iters * product == pytest.approx(value, abs=precision)


@pytest.mark.parametrize(
    ("name", "words", "times", "text"),
    [
        ("shakespeare", "14 times over", 14, 301_966),
        ("shakespeare_char", "82 times over", 82, SHAKESPEARE_TRAIN),
        ("shakespeare_char_cpu", "one and a half times over", 1.5, SHAKESPEARE_TRAIN),
        ("shakespeare_char_fast", "33 times over", 33, SHAKESPEARE_TRAIN),
        ("shakespeare_char_cpu_fast", "one and a half times over", 1.5, SHAKESPEARE_TRAIN),
        ("gpt2_124m", "33 times over", 33, 9_035_582_198),  # nanoGPT's own count
        ("gpt2_124m_fast", "11 times over", 11, 9_035_582_198),
        ("fineweb_edu_10b", "once over", 1, 10e9),
        ("finetune_shakespeare", "2.2 times over", 2.17, 301_966),
    ],
)
def test_a_recipe_says_how_often_it_reads_the_text(name, words, times, text):
    knobs = resolve(shipped(name))
    tokens = knobs.max_iters * knobs.gradient_accumulation_steps * knobs.batch_size * (knobs.block_size or 1024)
    assert words in comments_of(name).replace("\n ", " ")
    assert tokens / text == pytest.approx(times, rel=0.04)


@pytest.mark.parametrize("name", [name for name in SHIPPED if "-parameter" in text_of(name)])
def test_the_parameters_that_a_recipe_names_are_the_models(name):
    value, precision = number_of(re.search(r"([\d.]+[MB])-parameter", comments_of(name)).group(1))
    assert build_model(name).num_parameters() == pytest.approx(value, abs=precision)


def test_the_table_lists_every_recipe_with_its_size():
    row = r"\[(\w+)\]\(\.\./hub_configs/\1\.yaml\) \|.*\| ([\d.]+[MB]) parameters, context (\d+) \|"
    rows = re.findall(row, TABLE.read_text(encoding="utf-8"))
    assert sorted(name for name, _, _ in rows) == SHIPPED
    for name, parameters, context in rows:
        value, precision = number_of(parameters)
        model = build_model(name)
        assert model.num_parameters() == pytest.approx(value, abs=precision)
        assert model.config.block_size == int(context)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.endswith("_fast")])
def test_a_fast_recipe_has_another_optimizer_for_the_same_model_and_data(name):
    fast, plain = vars(resolve(shipped(name))), vars(resolve(shipped(name.removesuffix("_fast"))))
    changed = {key for key in fast if fast[key] != plain[key]} - {"out_dir", "max_iters", "lr_decay_iters"}
    measured = set() if name.startswith("gpt2_124m") else {"beta1", "momentum"}  # measured with small steps only
    assert changed == {"optimizer", "learning_rate", "lr_schedule", "min_lr", "warmup_iters"} | measured
    assert (fast["optimizer"], plain["optimizer"]) == ("muon", "adamw")


def test_shakespeare_char_has_nanogpts_numbers():
    assert (
        vars(resolve(shipped("shakespeare_char"))).items()
        >= {
            "block_size": 256,
            "n_layer": 6,
            "n_head": 6,
            "n_embd": 384,
            "dropout": 0.2,
            "batch_size": 64,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "min_lr": 1e-4,
            "optimizer": "adamw",
            "lr_schedule": "cosine",
            "decay_lr": True,
            "warmup_iters": 100,
            "lr_decay_iters": 5000,
            "max_iters": 5000,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.99,
            "grad_clip": 1.0,
            "eval_interval": 250,
            "log_interval": 10,
            "always_save_checkpoint": False,
            "seed": 1337,
        }.items()
    )
    assert build_model("shakespeare_char").config.bias is False


def test_shakespeare_char_cpu_has_nanogpts_numbers():
    assert (
        vars(resolve(shipped("shakespeare_char_cpu"))).items()
        >= {
            "block_size": 64,
            "n_layer": 4,
            "n_head": 4,
            "n_embd": 128,
            "batch_size": 12,
            "gradient_accumulation_steps": 1,
            "learning_rate": 1e-3,
            "min_lr": 1e-4,
            "optimizer": "adamw",
            "lr_schedule": "cosine",
            "decay_lr": True,
            "warmup_iters": 100,
            "lr_decay_iters": 2000,
            "max_iters": 2000,
            "weight_decay": 0.1,
            "beta1": 0.9,
            "beta2": 0.99,
            "grad_clip": 1.0,
            "eval_interval": 250,
            "seed": 1337,
        }.items()
    )
    config = build_model("shakespeare_char_cpu").config
    assert config.bias is False and config.dropout == 0


def test_the_defaults_are_nanogpts(recipe):
    assert (
        vars(resolve(recipe("corpus: x\n"))).items()
        >= {
            "batch_size": 12,
            "gradient_accumulation_steps": 5 * 8,
            "learning_rate": 6e-4,
            "max_iters": 600_000,
            "weight_decay": 1e-1,
            "beta1": 0.9,
            "beta2": 0.95,
            "grad_clip": 1.0,
            "optimizer": "adamw",
            "lr_schedule": "cosine",
            "decay_lr": True,
            "warmup_iters": 2000,
            "eval_interval": 2000,
            "always_save_checkpoint": True,
            "patience": 0,
            "seed": 1337,
        }.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# From YAML to arguments


def test_knobs_are_unique():
    assert len(KNOBS) == len(set(KNOBS))


def test_help_names_every_knob(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["--help"])
    shown = capsys.readouterr()
    assert stop.value.code == 0 and shown.err == ""
    assert "RECIPE.yaml" in shown.out
    assert set(KNOBS) <= set(re.findall(r"(?<!\S)--(\w+)", shown.out))


def test_without_a_recipe_it_is_the_quickstart():
    assert resolve() == resolve(shipped("quickstart"))
    assert resolve("--max_iters=7") == resolve(shipped("quickstart"), "--max_iters=7")
    assert resolve().out_dir == "out/quickstart" and resolve().data_dir == "data/quickstart"


def test_the_folders_are_named_after_the_recipe_unless_they_are_given(recipe):
    path = recipe("corpus: x\n", name="my notes.v2.yaml")
    assert (resolve(path).data_dir, resolve(path).out_dir) == ("data/my notes.v2", "out/my notes.v2")
    given = resolve(path, "--data_dir=d", "--out_dir=o")
    assert (given.data_dir, given.out_dir) == ("d", "o")
    path = recipe("data_dir: d\nout_dir: o\n")
    assert (resolve(path).data_dir, resolve(path).out_dir) == ("d", "o")


@pytest.mark.parametrize(
    ("key", "written", "given", "expected"),
    [
        ("batch_size", "4", "8", 8),
        ("learning_rate", "1e-3", "5e-4", 5e-4),
        ("dropout", "0.1", "0", 0.0),
        ("compile", "true", "false", False),
        ("always_save_checkpoint", "false", "true", True),
        ("dtype", "float32", "bfloat16", "bfloat16"),
        ("corpus", "a.txt", "b.txt", "b.txt"),
    ],
)
def test_the_command_line_wins_over_the_recipe(recipe, key, written, given, expected):
    path = recipe(f"{key}: {written}\n")
    assert getattr(resolve(path, f"--{key}={given}"), key) == expected
    assert getattr(resolve(path, f"--{key}", given), key) == expected
    assert getattr(resolve(path), key) != expected


@pytest.mark.parametrize("nothing", ["null", "Null", "NULL", "~", "", "  # to be decided"])
@pytest.mark.parametrize("key", ["batch_size", "learning_rate", "dtype", "compile", "n_layer", "corpus", "out_dir"])
def test_a_null_keeps_the_default(recipe, key, nothing):
    path = recipe(f"seed: 7\n{key}: {nothing}\n")
    assert resolve(path) == resolve(recipe("seed: 7\n"))


@pytest.mark.parametrize(
    ("written", "expected"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("6e-4", 6e-4), ("1", 1.0), (".5", 0.5), ("1.0e-05", 1e-5), ("'0.1'", 0.1)],
)
def test_a_number_is_a_float_however_it_is_written(recipe, written, expected):
    value = resolve(recipe(f"learning_rate: {written}\n")).learning_rate
    assert type(value) is float and value == expected


@pytest.mark.parametrize("key", ["compile", "decay_lr", "bias"])  # their defaults: false, true, and the model's
@pytest.mark.parametrize("expected", [True, False])
def test_a_boolean_may_be_spelled_in_many_ways(recipe, key, expected):
    words = ("true", "yes", "t", "y", "1") if expected else ("false", "no", "f", "n", "0")
    for word in words:
        for spelling in (word, word.upper(), word.title(), f"'{word}'"):
            assert getattr(resolve(recipe(f"{key}: {spelling}\n")), key) is expected, spelling


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("corpus: two words.txt", "two words.txt"),
        ("corpus: C:\\texts\\a.txt", "C:\\texts\\a.txt"),
        ("corpus: https://host:80/a?b=c", "https://host:80/a?b=c"),
        ("corpus: key=value", "key=value"),
        ("corpus: --out_dir=x", "--out_dir=x"),
        ("corpus: -v", "-v"),
        ("corpus: a#b.txt", "a#b.txt"),
        ("corpus: 'a # b.txt'  # a comment", "a # b.txt"),
        ('corpus: "it\'s \\"so\\""', 'it\'s "so"'),
        ("corpus: 'it''s \"so\"'", 'it\'s "so"'),
        ("corpus: '  padded  '", "  padded  "),
        ("corpus: notes/**/*.md", "notes/**/*.md"),
        ("corpus: 100%s $ ~/{x}", "100%s $ ~/{x}"),
        ("corpus: '@file'", "@file"),
        ("corpus: 0123", "0123"),
        ("corpus: 1e3", "1e3"),
        ("corpus: 2024-01-01", "2024-01-01"),
        ("corpus: yes", "yes"),
        ("corpus: 'null'", "null"),
        ("corpus: a~", "a~"),
        ("corpus: |-\n  two\n  lines", "two\nlines"),
        ("corpus: >-\n  folded\n  lines", "folded lines"),
        ("{corpus: flow, seed: 7}", "flow"),
        ("corpus: Überblick/日本語/\N{OWL}.txt", "Überblick/日本語/\N{OWL}.txt"),
        ("\N{ZERO WIDTH NO-BREAK SPACE}corpus: after a byte order mark", "after a byte order mark"),
        ("corpus: windows line ends\r\nseed: 7\r", "windows line ends"),
    ],
)
def test_a_text_arrives_as_it_is_written(recipe, line, expected):
    assert resolve(recipe(line + "\n")).corpus == expected


@pytest.mark.parametrize("value", ["a b", "--x=y", "-v", "k=v=w", "a # b", "'q'", "Ü/日本.txt", "", "null", "x" * 300])
def test_a_text_arrives_from_the_command_line_and_from_a_dumped_recipe(recipe, value):
    path = recipe("seed: 7\n")
    assert resolve(path, f"--tokenizer={value}").tokenizer == value
    if value:
        assert resolve(recipe(yaml.safe_dump({"tokenizer": value}))).tokenizer == value


def test_a_recipe_may_be_anywhere_under_any_name(tmp_path):
    path = tmp_path / "Überblick 日本" / "é # =.yml"
    path.parent.mkdir()
    path.write_text("seed: 7\n")
    assert resolve(path).seed == 7
    assert resolve(path).out_dir == "out/é # ="


def test_run_yaml_is_a_recipe_that_resolves_to_the_same_arguments(run):
    again = resolve(run.out_dir / "run.yaml")
    assert again == resolve(run.out_dir.parent / "recipe.yaml")
    assert again.out_dir == str(run.out_dir) and again.lr_decay_iters == again.max_iters


def test_run_yaml_names_every_knob_but_those_left_to_the_model(run):
    written = yaml.safe_load((run.out_dir / "run.yaml").read_text())
    shape = {field.name for field in dataclasses.fields(ModelArguments)}
    assert set(KNOBS) - shape - {"hub_model_id"} <= set(written) <= set(KNOBS)
    assert {type(value) for value in written.values()} <= {str, int, float, bool}


@pytest.mark.parametrize("max_iters", [1, 99, 100, 101])
def test_a_short_run_may_end_within_its_warmup(max_iters):
    knobs = resolve(shipped("quickstart"), f"--max_iters={max_iters}")
    assert knobs.lr_decay_iters == max_iters


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_the_refusal_of_a_missing_recipe_names_the_recipes_that_exist(tmp_path, refusal):
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "no" / "folder.yaml"):
        message = refusal(path)
        assert str(path) in message
        assert all(name in message for name in SHIPPED)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("corpus: 'never closed\n", ["recipe.yaml", "YAML"]),
        ("\tcorpus: x\n", ["recipe.yaml", "YAML"]),
        ("seed: 7\n---\nseed: 8\n", ["recipe.yaml", "YAML"]),
        (b"corpus: caf\xe9\n", ["recipe.yaml", "YAML"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00", ["recipe.yaml", "YAML"]),
        ("- corpus\n- tokenizer\n", ["recipe.yaml", "key: value"]),
        ("corpus\n", ["recipe.yaml", "key: value"]),
        ("corpus=x\n", ["recipe.yaml", "key: value"]),
        ("", ["recipe.yaml", "key: value"]),
        ("# corpus: x\n", ["recipe.yaml", "key: value"]),
        ("model:\n  n_layer: 3\n", ["recipe.yaml", "model"]),
        ("corpus: {path: x}\n", ["recipe.yaml", "corpus"]),
        ("corpus: [a.txt, b.txt]\n", ["recipe.yaml", "corpus"]),
        ("corpus:\n- a.txt\n", ["recipe.yaml", "corpus"]),
        ("seed: 7\nseed: 7\n", ["recipe.yaml", "seed", "twice"]),
        ("seed: 7\nseed:\n", ["recipe.yaml", "seed", "twice"]),
        ("{{name}}: 3\n", ["recipe.yaml"]),
        ("? [n_layer, n_head]\n: 3\n", ["recipe.yaml"]),
        ("n_layr: 3\n", ["'n_layr'", "'n_layer'"]),
        ("n_layr:\n", ["'n_layr'", "'n_layer'"]),
        ("n-layer: 3\n", ["'n-layer'", "'n_layer'"]),  # otherwise a key could stand there twice, in two spellings
        ("--n_layer: 3\n", ["'n_layer'"]),
        ("n layer: 3\n", ["'n layer'", "'n_layer'"]),
        ("learning_rte: 1e-3\n", ["'learning_rte'", "'learning_rate'"]),
        ("no_decay_lr: true\n", ["no_decay_lr"]),
        ("help: true\n", ["help"]),
        ("n_layer: three\n", ["n_layer", "three"]),
        ("n_layer: 3.5\n", ["n_layer", "3.5"]),
        ("max_iters: 1e3\n", ["max_iters", "1e3"]),
        ("learning_rate: fast\n", ["learning_rate", "fast"]),
        ("compile: maybe\n", ["compile", "maybe"]),
        ("bias: 2\n", ["bias", "2"]),
        ("dtype: fp61\n", ["dtype", "fp61", "bfloat16"]),
        ("optimizer: sgd\n", ["optimizer", "sgd", "muon"]),
        ("lr_schedule: triangle\n", ["lr_schedule", "triangle", "wsd"]),
        ("decay_fraction: 40\n", ["decay_fraction=40", "below 1"]),
        ("batch_size: 0\n", ["batch_size=0", "at least 1"]),
        ("gradient_accumulation_steps: -1\n", ["gradient_accumulation_steps=-1", "at least 1"]),
        ("max_iters: 0\n", ["max_iters=0", "at least 1"]),
        ("eval_interval: 0\n", ["eval_interval=0", "at least 1"]),
        ("log_interval: 0\n", ["log_interval=0", "at least 1"]),
        ("tokenizer: bpe\nvocab_size: 100\n", ["vocab_size=100", "257"]),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line_that_names_it(recipe, refusal, text, said):
    message = refusal(recipe(text))
    assert all(part in message for part in said)
    assert "Node(" not in message  # the YAML library's own name for it would help nobody


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n_layr=3"], ["'n_layr'", "'n_layer'"]),
        (["--n_lay=3"], ["'n_lay'", "'n_layer'"]),  # no abbreviations: a new knob would make them ambiguous
        (["--n_lay", "3"], ["'n_lay'", "'n_layer'"]),
        (["--learning-rte=3"], ["'learning-rte'", "'learning_rate'"]),
        (["--seed=7", "stray.yaml"], ["'stray.yaml'", "--key=value"]),
        (["--compile", "yes", "seed=7"], ["'seed=7'", "--key=value"]),
        (["-v"], ["'-v'", "--key=value"]),
        (["--seed"], ["seed"]),
        (["--seed="], ["seed"]),
        (["--seed=one"], ["seed", "one"]),
        (["--learning_rate=1e-"], ["learning_rate", "1e-"]),
        (["--compile=maybe"], ["compile", "maybe"]),
        (["--dtype=int8"], ["dtype", "int8", "float16"]),
        (["--batch_size=0"], ["batch_size=0"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_names_it(refusal, flags, said):
    message = refusal(shipped("shakespeare_char"), *flags)
    assert all(part in message for part in said)
    assert refusal(*flags) == message  # without a recipe too


def test_a_second_recipe_is_refused(refusal):
    message = refusal(shipped("shakespeare_char"), "stray.yaml")
    assert "'stray.yaml'" in message and "--key=value" in message
