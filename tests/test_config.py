"""Recipes: defaults, then the file, then overrides; one sentence for what is wrong."""

from pathlib import Path

import pytest
from conftest import ROOT

from launch.config import DEFAULT_RECIPE, dump_recipe, intended_run_directory, load_recipe, parse_command_line
from launch.errors import ConfigError

MINIMAL = "model: {name_or_path: base}\ndata: {train: rows.jsonl, template: qwen2}\n"


def load(tmp_path: Path, text: str, *overrides: str) -> object:
    path = tmp_path / "my-run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_dumps_to_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(copy) == recipe


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, MINIMAL + "train: {learning_rate: 2e-4, seed: 3}", "train.seed=4", "adapter.target_modules=[q_proj]"
    )
    assert (recipe.train.learning_rate, recipe.train.seed, recipe.train.weight_decay) == (2e-4, 4, 0.0)
    assert recipe.adapter.target_modules == ("q_proj",)
    assert recipe.run_directory == Path("runs/my-run")


def test_without_a_recipe_the_default_runs() -> None:
    assert parse_command_line([]) == load_recipe(DEFAULT_RECIPE)
    assert parse_command_line(["train.seed=9"]).train.seed == 9


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train: {learning_rte: 1e-4}", "train.learning_rte is not a recipe key; did you mean train.learning_rate?"),
        ("train: {report_to: [wandb]}", "train.report_to is not a recipe key; did you mean run.report_to?"),
        ("trian: {seed: 1}", "trian is not a recipe key; did you mean train?"),
        ("train: {global_batch_size: 0}", "train.global_batch_size = 0 is not valid: input should be greater than"),
        (
            "train: {global_batch_size: many}",
            "train.global_batch_size = 'many' is not valid: input should be a valid integer",
        ),
        ("train: {global_batch_size: true}", "train.global_batch_size = True is not valid"),
        ("train: {seed: 1, seed: 2}", "seed is given twice"),
        ("train: [1]", "must hold blocks of keys"),
        ("train: {seed: 1", "is not YAML"),
        ("adapter: {target_modules: []}", "adapter.target_modules is empty"),
        ("train: {warmup_steps: 5, warmup_ratio: 0.1}", "keep one"),
        ("run: {name: ../elsewhere}", "run.name = '../elsewhere' is not valid"),
        ("train: {max_tokens_per_micro_batch: 100}", "the longest sample would fit no micro-batch"),
        ("train: {learning_rate: .inf}", "train.learning_rate = inf is not valid: input should be a finite number"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL + text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ("train: [{pth: rows.jsonl}]", "data.train[0].pth is not a recipe key; did you mean data.train[0].path?"),
        ("train: [{path: rows.jsonl, weight: 0}]", "data.train[0].weight = 0 is not valid: input should be greater"),
        ("train: [3]", "data.train: a source is a path or {path: ..., weight: ...}, but this is 3."),
        ("train: []", "data.train = () is not valid: tuple should have at least 1 item"),
        ("train: a, evaluation: b, test_size: 0.1", "data.evaluation and data.test_size are both set; keep one"),
        ("train: a, evaluation: [{path: b, weight: 2}]", "data.evaluation has a weight, but every held-out row counts"),
        ("train: a, format: messages, prompt_template: alpaca", "data has both a format (messages) and a prompt_templ"),
        ("train: [{path: a, format: messages, prompt_template: mine}]", "a has both a format (messages) and a prompt_"),
        ("train: a, test_size: .inf", "data.test_size = inf is not valid: input should be a finite number"),
        ("train: a, bad_rows: drop", "data.bad_rows = 'drop' is not valid: input should be 'quarantine' or 'error'"),
    ],
)
def test_what_is_wrong_with_the_sources(tmp_path: Path, data: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"model: {{name_or_path: base}}\ndata: {{template: chatml, {data}}}")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_may_be_a_path_or_a_list(tmp_path: Path) -> None:
    head = "model: {name_or_path: base}\ndata: {template: chatml, train: "
    one, several = load(tmp_path, head + "a}"), load(tmp_path, head + "[a, {path: b, weight: 2, max_rows: 5}]}")
    assert [source.path for source in one.data.train] == ["a"] and one.data.train == several.data.train[:1]
    assert (several.data.train[1].weight, several.data.train[1].max_rows) == (2.0, 5)
    (tmp_path / "again.yaml").write_text(dump_recipe(several), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml").data == several.data


def test_a_missing_recipe_names_those_that_ship() -> None:
    with pytest.raises(ConfigError, match=r"There is no recipe nowhere\.yaml.*configs/recipes/tiny\.yaml"):
        load_recipe(Path("nowhere.yaml"))


def test_a_required_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.template is required"):
        load(tmp_path, "model: {name_or_path: base}\ndata: {train: rows.jsonl}")


def test_overrides_need_a_block(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not of the form block\.key=value"):
        load(tmp_path, MINIMAL, "seed=1")


def test_a_refused_recipe_still_has_a_run_directory(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert intended_run_directory([str(path)]) == Path("runs/mine")  # it does not exist
    path.write_text("run: {output_dir: elsewhere, name: given}\ntrain: {nonsense: 1}", encoding="utf-8")
    assert intended_run_directory([str(path)]) == Path("elsewhere/given")
    assert intended_run_directory([str(path), "run.name=over", "run.output_dir=there"]) == Path("there/over")
    assert intended_run_directory([str(path), "run.name=../over"]) == Path("elsewhere/mine")
