"""Mistakes that users make in a config, and what ``run_expid.py`` answers: place, key and fix, and no traceback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

Command = Callable[..., Any]
MODELS, DATASETS = "model_config.yaml", "dataset_config.yaml"


class Mistake(NamedTuple):
    """One edit of a sound config directory, and words of its answer.

    Attributes:
        file: which of the two files is edited.
        old: text in it; the answer names the line where it begins (see ``line``).
        new: what the user wrote in its place.
        words: the answer holds all of them: the key, and the fix.
        expid: the experiment that is run.
        line: whether the answer begins with file and line of the edit.
    """

    file: str
    old: str
    new: str
    words: tuple[str, ...]
    expid: str = "TWIN_tiny"
    line: bool = True


MISTAKES = {
    "typo in a key": Mistake(MODELS, "  max_len:", "  max_lenn:", ("unknown key 'max_lenn'", "did you mean 'max_len'?")),
    "key of another model": Mistake(
        MODELS, "  epochs: 1", "  n_item_experts: 4\n  epochs: 1",
        ("unknown key 'n_item_experts' for model TWIN", "it is a key of MoS_TWIN: choose that model, or take the key out"),
    ),
    "typo in the model": Mistake(MODELS, "  model: TWIN", "  model: TWINN", ("no model 'TWINN'", "nearest: TWIN")),
    "typo in a metric": Mistake(
        MODELS, "  metrics: [gAUC, AUC, logloss]", "  metrics: [gAUC, AUC, loglos]",
        ("metrics: 'loglos' is not known", "the nearest is 'logloss'"),
    ),
    "text for a number": Mistake(
        MODELS, "  embedding_dim: 16", "  embedding_dim: 64d",
        ("embedding_dim: '64d': input should be a valid integer", "write for example `embedding_dim: 10`"),
    ),
    "a truth value for a number": Mistake(
        MODELS, "  epochs: 1", "  epochs: True", ("epochs: True: input should be a valid integer", "`epochs: 100`")
    ),
    "a number for a truth value": Mistake(
        MODELS, "  shuffle: True", "  shuffle: 1", ("shuffle: 1: input should be a valid boolean", "`shuffle: True`")
    ),
    "nothing for a number": Mistake(
        MODELS, "  batch_size: 256", "  batch_size:",
        ("batch_size: null: input should be a valid integer", "`batch_size: 8192`"),
    ),
    "a list for a number": Mistake(
        MODELS, "  batch_size: 256", "  batch_size: [256, 512]",
        ("batch_size: [256, 512]: input should be a valid integer", "`batch_size: 8192`"),
    ),
    "more experts chosen than there are": Mistake(
        MODELS, "  topk_item: 2", "  topk_item: 5", ("topk_item (5) must lie in 1..n_item_experts (4)",), "MoS_TWIN_tiny"
    ),
    "weights that sum to more than 1": Mistake(
        MODELS, "  codebook_dim: 8", "  alpha_item: 0.6\n  alpha_window: 0.6\n  codebook_dim: 8",
        ("alpha_item (0.6) and alpha_window (0.6) must be >= 0 and sum to at most 1",), "MoS_TWIN_tiny",
    ),
    "heads that do not divide the width": Mistake(
        MODELS, "  attention_dim: 16\n  num_heads: 2", "  attention_dim: 60\n  num_heads: 8",
        ("attention_dim (60) must be a multiple of num_heads (8)",),
    ),
    "a stride of nothing": Mistake(
        MODELS, "  window_stride: 2", "  window_stride: 0", ("window_size (4) and window_stride (0) must be at least 1",),
        "MoS_TWIN_tiny", line=False,
    ),
    "a layer too many in a list": Mistake(
        MODELS, "  batch_norm: True", "  net_dropout: [0.1, 0.1]\n  batch_norm: True",
        ("net_dropout has 2 entries for the 1 layers of dnn_hidden_units", "one value for all"),
    ),
    "a tab": Mistake(MODELS, "  topk: 8", "\ttopk: 8", ("not valid yaml: found character '\\t'", "indent with spaces")),
    "a key twice": Mistake(
        MODELS, "  short_seq_len: 8", "  embedding_dim: 8",
        ("'TWIN_tiny' sets 'embedding_dim' twice", "take one of them out"),
    ),
    "no learning": Mistake(
        MODELS, "  learning_rate: 1.e-2", "  learning_rate: 0", ("learning_rate: 0: must be above 0",)
    ),
    "an infinite learning rate": Mistake(
        MODELS, "  learning_rate: 1.e-2", "  learning_rate: .inf", ("learning_rate: inf: must be a finite number",)
    ),
    "a negative dropout": Mistake(
        MODELS, "  batch_norm: True", "  net_dropout: -0.1", ("net_dropout: -0.1: must be at least 0 and below 1",)
    ),
    "an unknown optimizer": Mistake(
        MODELS, "  batch_norm: True", "  optimizer: adamx",
        ("optimizer: 'adamx': not one of adam,", "did you mean 'Adamax'?"),
    ),
    "a loss of logits": Mistake(
        MODELS, "  batch_norm: True", "  loss: binary_cross_entropy_with_logits",
        ("loss: 'binary_cross_entropy_with_logits': not one of", "did you mean 'binary_cross_entropy'?"),
    ),
    "code for a loss": Mistake(
        MODELS, "  batch_norm: True", "  loss: __class__ or __import__('os').system('echo read')",
        ("not one of binary_crossentropy, ",),
    ),
    "an unknown activation": Mistake(
        MODELS, "  batch_norm: True", "  dnn_activations: rulu",
        ("dnn_activations: 'rulu': write relu, or the name of a layer in torch.nn", "did you mean 'ReLU'?"),
    ),
    "a monitor without its groups": Mistake(
        MODELS, "  group_id: user_index", "  group_id:", ("gAUC", "there is no group id; set group_id: to a column"),
        line=False,
    ),
    "a monitor that keeps the worst": Mistake(
        MODELS, "  monitor: {gAUC: 1, AUC: 1}", "  monitor: logloss",
        ("monitor: logloss: falls as a model gets better", "set `monitor_mode: min`"),
    ),
    "typo in a tracker": Mistake(
        MODELS, "  shuffle: True", "  trackers: [csv, tensorbord]",
        ("trackers: 'tensorbord'", "did you mean 'tensorboard'?"),
    ),
    "typo in the data set": Mistake(
        MODELS, "  dataset_id: tiny", "  dataset_id: tinny", ("dataset_id 'tinny' is not in", "nearest: tiny")
    ),
    "a data set beside the results": Mistake(
        DATASETS, "tiny:", "../tiny:", ("dataset_id: '../tiny': it names a folder of the results: no '/'", "rename it"),
        line=False,
    ),
    "no item_info": Mistake(DATASETS, "    item_info: ", "    #", ("no 'item_info'; add it to",), line=False),
    "a file that is not there": Mistake(
        DATASETS, "/item_info.parquet", "/items.parquet",
        ("items.parquet: no such file; see data/README.md for how to get",), line=False,
    ),
    "typo in the label": Mistake(
        DATASETS, "{name: is_click,", "{name: is_clik,", ("no column 'is_clik' (did you mean 'is_click'?)",), line=False
    ),
    "text for the label": Mistake(
        DATASETS, "label_col: {name: is_click, dtype: float}", "label_col: is_click",
        ("label_col: 'is_click': input should be a valid dictionary or a valid list", "`label_col: {'name': 'is_click'}`"),
    ),
    "a feature twice": Mistake(
        DATASETS, "{name: cate_id", "{name: item_id", ("feature_cols: item_id: listed twice; take one of the entries out",)
    ),
    "no vocabulary": Mistake(
        DATASETS, "- {name: cate_id, active: True, dtype: int, type: categorical, source: item, vocab_size:",
        "- {name: cate_id, type: categorical, source: item, min_categr_count:",
        ("feature_cols: cate_id: vocab_size is required (the largest id of the column + 1, or more)",),
    ),
    "typo in a feature's key": Mistake(
        DATASETS, "- {name: cate_id, active: True", "- {name: cate_id, activ: True",
        ("feature_cols: cate_id: unknown key 'activ'", "did you mean 'active'?"),
    ),
    "typo in a source": Mistake(
        DATASETS, "- {name: cate_id, active: True, dtype: int, type: categorical, source: item",
        "- {name: cate_id, type: categorical, source: itme",
        ("feature_cols: cate_id: source: 'itme': write item for a column of item_info, or leave it out",),
    ),
    "code for an encoder": Mistake(
        DATASETS, '"nn.Identity()"', "\"__import__('os').system('echo read')\"",
        ("feature_cols: image_emb_dim16: feature_encoder:", "a feature of type embedding can have; write nn.Identity()"),
    ),
    "evaluations out of reach": Mistake(
        MODELS, "  epochs: 1", "  epochs: 1\n  eval_steps: 1000",
        ("eval_steps: 1000: must be at most 6, the steps of the shortest phase", "lower it, or leave it out"), line=False,
    ),
}  # fmt: skip


@pytest.fixture
def edited(tiny_config: Path, tmp_path: Path) -> Callable[..., Path]:
    """``edited((file, old, new), ...)``: a copy of the tiny config directory with texts replaced."""

    def make(*edits: tuple[str, str, str]) -> Path:
        for name in (MODELS, DATASETS):
            text = (tiny_config / name).read_text()
            for file, old, new in edits:
                if file == name:
                    assert old in text, f"{old!r} is not in {name}"
                    text = text.replace(old, new, 1)
            (tmp_path / name).write_text(text)
        return tmp_path

    return make


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_with_its_place_its_key_and_the_fix(
    cli: Command, edited: Callable[..., Path], tiny_config: Path, tmp_path: Path, case: str
) -> None:
    mistake = MISTAKES[case]
    folder = edited((mistake.file, mistake.old, mistake.new))
    arguments = ["--config", folder, "--expid", mistake.expid, "--set", f"model_root={tmp_path / 'runs'}"]
    if case == "a data set beside the results":
        arguments += ["--set", "dataset_id=../tiny"]
    answer = cli(*arguments)
    assert answer.code == 2 and answer.err.startswith("error: ") and "Traceback" not in answer.out + answer.err
    assert answer.err.count("\n") == 1, "one mistake is one line"
    for words in mistake.words:
        assert words in answer.err
    if mistake.line:
        line = (tiny_config / mistake.file).read_text().split(mistake.old)[0].count("\n") + 1
        places = [f"{folder / mistake.file}:{number}: " for number in (line, line + mistake.new.count("\n"))]
        assert any(place in answer.err for place in places), answer.err
    assert not (tmp_path / "runs").exists() and "read\n" not in answer.out


def test_five_mistakes_get_five_lines_in_one_answer(cli: Command, edited: Callable[..., Path]) -> None:
    folder = edited(
        (MODELS, "  max_len:", "  max_lenn:"),
        (MODELS, "  learning_rate: 1.e-2", "  learning_rate: 0"),
        (MODELS, "  topk_item: 2", "  topk_item: 5"),
        (MODELS, "  window_stride: 2", "  window_stride: 0"),
        (DATASETS, "{name: cate_id", "{name: item_id"),
    )
    answer = cli("--config", folder, "--expid", "MoS_TWIN_tiny")
    title, *lines = answer.err.rstrip("\n").split("\n  ")
    assert answer.code == 2 and title == "error: MoS_TWIN_tiny: 5 mistakes:" and len(lines) == 5
    for words in ("max_lenn", "learning_rate: 0:", "topk_item (5)", "window_stride (0)", "item_id: listed twice"):
        assert sum(words in line for line in lines) == 1, words
    assert all(line.startswith((f"{folder / MODELS}:", f"{folder / DATASETS}:")) for line in lines)


def test_an_unknown_model_and_data_set_do_not_hide_the_other_mistakes(cli: Command, edited: Callable[..., Path]) -> None:
    folder = edited(
        (MODELS, "  model: TWIN", "  model: TWINN"),
        (MODELS, "  dataset_id: tiny", "  dataset_id: tinny"),
        (MODELS, "  max_len:", "  max_lenn:"),
        (MODELS, "  metrics: [gAUC, AUC, logloss]", "  metrics: [gAUC, AUV, loglos]"),
        (MODELS, "  epochs: 1", "  epochs: many"),
    )
    answer = cli("--config", folder, "--expid", "TWIN_tiny", "--set", "seed")
    title, *lines = answer.err.rstrip("\n").split("\n  ")
    assert answer.code == 2 and title == "error: TWIN_tiny: 7 mistakes:" and len(lines) == 7
    for words in ("'TWINN'", "'tinny'", "'max_lenn'", "'AUV'", "'loglos'", "epochs: 'many'", "--set seed: write it as"):
        assert sum(words in line for line in lines) == 1, words


def test_an_experiment_that_does_not_exist_names_the_nearest(cli: Command, tiny_config: Path) -> None:
    answer = cli("--config", tiny_config, "--expid", "MoS_TWIN_tny")
    assert answer.code == 2 and "expid 'MoS_TWIN_tny' is not in" in answer.err and "nearest: MoS_TWIN_tiny" in answer.err


def test_the_config_without_mistakes_is_answered_with_its_plan(cli: Command, edited: Callable[..., Path]) -> None:
    for expid in ("TWIN_tiny", "MoS_TWIN_tiny"):
        answer = cli("--config", edited(), "--expid", expid, "--dry-run")
        assert answer.code == 0 and answer.err == "" and "parameters: embedding" in answer.out
