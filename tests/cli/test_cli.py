"""The program as a user types it, in processes of its own where exit codes and streams matter."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import DOCUMENTS, quantize_tiny

from tinier import __version__ as tinier_version
from tinier.checkpoint import Checkpoint
from tinier.cli import main as cli

Tiny = Callable[..., Checkpoint]


def tinier(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tinier.cli.main", *map(str, arguments)],
        capture_output=True, text=True, input=stdin, check=False,
    )  # fmt: skip


def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command; faster than a process."""
    monkeypatch.setattr(sys, "argv", ["tinier", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_quantize_prints_the_result_and_keeps_progress_apart(tiny: Tiny, tmp_path: Path) -> None:
    done = tinier("quantize", tiny().folder, "--preset", "fp8", "--out", tmp_path / "q", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) == 1
    assert result["stage"] == "quantize"
    assert result["out"] == str(tmp_path / "q")
    assert "quantize fp8: about 0.0 GB of memory" in done.stderr


@pytest.mark.slow
def test_quiet_is_quiet(tiny: Tiny, tmp_path: Path) -> None:
    done = tinier("quantize", tiny().folder, "--preset", "int8", "--out", tmp_path / "q", "--quiet")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "dB SNR on average" in done.stdout


def test_bad_input_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    done = tinier("quantize", tmp_path / "nothing", "--preset", "fp8", "--out", tmp_path / "q")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" in tinier(
        "quantize", tmp_path / "nothing", "--preset", "fp8", "--out", tmp_path / "q", "--debug"
    ).stderr  # fmt: skip


def test_unknown_options_and_log_levels_exit_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    code, _, _ = in_process(monkeypatch, capsys, "quantize", "--fast")
    assert code == 2
    monkeypatch.setenv("TINIER_LOG_LEVEL", "loud")
    code, _, stderr = in_process(
        monkeypatch, capsys, "quantize", tiny().folder, "--preset", "fp8", "--out", tmp_path / "q"
    )
    assert code == 2
    assert "log level 'loud' is not known" in stderr


def test_dry_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    source, out = tiny().folder, tmp_path / "out"
    for arguments in (
        ["quantize", source, "--preset", "int4", "--group-size", "32"],
        ["prune", source, "--drop-layers", "1", "--length", "64"],
        ["prune", source, "--keep-layers", "75%", "--length", "64"],
        ["distill", source, "--teacher", source, "--steps", "11", "--batch", "4", "--length", "32"],
    ):
        code, stdout, _ = in_process(
            monkeypatch, capsys, *arguments, "--out", out, "--dry-run", "--json"
        )
        assert code == 0
        plan = json.loads(stdout)
        assert plan["stage"] == arguments[0]
        assert plan["estimated_disk_bytes"] > 0
        assert plan["estimated_memory_bytes"] > 0
        assert plan["estimated_seconds"] >= 0
        assert not out.exists()


@pytest.mark.parametrize(
    "arguments", [("--group-size", "32"), ("--weighting", "fisher"), ("--drift", "corrected")]
)
def test_distill_takes_options_of_a_grid_with_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path,
    arguments: tuple[str, str],
) -> None:  # fmt: skip
    source = tiny().folder
    common = ["distill", source, "--teacher", source, "--steps", "11", "--batch", "4", "--length", "32",
              "--out", tmp_path / "out", "--dry-run", *arguments]  # fmt: skip
    code, _, stderr = in_process(monkeypatch, capsys, *common)
    assert code == 2
    assert f"{arguments[0]} goes with --quantize" in stderr
    grid = ["--quantize", "int4-gptq"] + ["--group-size", "32"] * (arguments[0] != "--group-size")
    code, stdout, stderr = in_process(monkeypatch, capsys, *common, *grid, "--json")
    assert code == 0, stderr
    chosen = json.loads(stdout)["parameters"]["quantize"]
    assert str(chosen[arguments[0][2:].replace("-", "_")]) == arguments[1]


def test_stages_chain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    base = tiny(dtype=torch.bfloat16).folder
    for arguments in (
        ["prune", base, "--drop-layers", "2", "--length", "64", "--out", tmp_path / "pruned"],
        ["distill", tmp_path / "pruned", "--teacher", base, "--steps", "2", "--batch", "2",
         "--micro-batch", "2", "--length", "64", "--warmup-steps", "1", "--device", "cpu",
         "--out", tmp_path / "healed"],
        ["quantize", tmp_path / "healed", "--preset", "fp8", "--out", tmp_path / "small"],
        ["eval", tmp_path / "small", "--against", base, "--windows", "2", "--length", "64"],
        ["bench", tmp_path / "small", "--against", base, "--concurrency", "1,2", "--repeats", "1",
         "--input-length", "8", "--output-length", "4", "--device", "cpu"],
    ):  # fmt: skip
        code, stdout, stderr = in_process(monkeypatch, capsys, *arguments)
        assert code == 0, stderr
        assert stdout.strip()
    assert "KL" not in stdout
    assert "×base" in stdout


def test_generate_streams_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny
) -> None:
    arguments = ["generate", tiny().folder, "--prompt", "Hello", "--max-tokens", "8"]
    code, stdout, _ = in_process(monkeypatch, capsys, *arguments)
    assert code == 0
    code, as_json, _ = in_process(monkeypatch, capsys, *arguments, "--json")
    result = json.loads(as_json)
    assert result["text"] == stdout.removesuffix("\n")
    assert result["prompt_tokens"] == 5
    done = tinier(
        "generate", tiny(name="b").folder, "--prompt", "-", "--max-tokens", "2", stdin="Hi"
    )
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--chat"], "has no chat template"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0"),
    ],
)
def test_generate_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    code, _, stderr = in_process(monkeypatch, capsys, "generate", tiny().folder, *arguments)
    assert code == 2
    assert message in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "repeats=0"),
        (["--concurrency", "1;2"], "is no list of numbers"),
        (["--request-rate", "2"], "--request-rate is for a server's URL"),
    ],
)
def test_bench_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    code, _, stderr = in_process(monkeypatch, capsys, "bench", tiny().folder, *arguments)
    assert code == 2
    assert message in stderr


def test_report_needs_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, stderr = in_process(monkeypatch, capsys, "report", tmp_path)
    assert code == 2
    assert "has no results.json" in stderr


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = in_process(monkeypatch, capsys, "--version")
    assert (code, stdout) == (0, f"tinier {tinier_version}\n")


def test_text_streams_hold_back_incomplete_characters() -> None:
    from tests.conftest import byte_tokenizer

    from tinier.engine.text import TextStream

    stream = TextStream(byte_tokenizer())
    ids = byte_tokenizer()("aé")["input_ids"]
    assert [stream.push(i) for i in ids] == ["a", "", "é"]
    assert stream.close() == ""
    broken = TextStream(byte_tokenizer())
    assert broken.push(ids[1]) == ""
    assert broken.close() == "�"


@pytest.mark.slow
def test_compare_names_the_layers_that_hurt_most(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny()
    made = quantize_tiny(source, "int4", tmp_path / "q", ignore=("*.1.*", "*.2.*", "*.3.*"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS))
    arguments = ["compare", source.folder, made.folder, "--text", text, "--length", "64", "--quiet"]
    done = tinier(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    alone = [layer["layer_snr_db"] for layer in result["layers"]]
    assert 5 < alone[0] < 40
    assert alone[1:] == [None, None, None]  # the same weights: no error on the same inputs
    assert all(layer["stream_snr_db"] is not None for layer in result["layers"])
    assert result["second"]["kl"] > 0
    assert "layers that hurt most: model.layers.0 (" in tinier(*arguments).stdout


def test_compare_of_other_depths_looks_at_the_ends(tiny: Tiny, tmp_path: Path) -> None:
    one, other = tiny(name="one"), tiny(name="other", num_hidden_layers=3)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS))
    done = tinier("compare", one.folder, other.folder, "--text", text, "--length", "64")
    assert done.returncode == 0, done.stderr
    assert "only their ends are compared" in done.stdout


def test_nothing_ends_in_a_traceback_without_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(error: Exception) -> None:
        raise error

    for error, code, told in (
        (
            RuntimeError("odd\nthing"),
            1,
            "should not happen (RuntimeError: odd thing). It is a fault of",
        ),
        (torch.OutOfMemoryError("CUDA"), 1, "out of memory: CUDA"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "/root/x: Permission denied."),
    ):
        monkeypatch.setattr(cli, "app", lambda error=error: fails(error))
        found, _, stderr = in_process(monkeypatch, capsys, "run")
        assert (found, len(stderr.splitlines())) == (code, 1)
        assert told in stderr
        with pytest.raises(type(error)):
            in_process(monkeypatch, capsys, "run", "--debug")


def test_bytes_that_are_no_text_are_an_error(tiny: Tiny) -> None:
    folder = tiny().folder
    for arguments, stdin in ((["-"], b"\xff\xfe"), ([b"a\xff"], b"")):
        command = [sys.executable, "-m", "tinier", "generate", str(folder), "--quiet", "--prompt"]
        typed = [a if isinstance(a, bytes) else a.encode() for a in (*command, *arguments)]
        done = subprocess.run(typed, input=stdin, capture_output=True, check=False)
        assert done.returncode == 2, done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.slow
def test_a_terminal_that_knows_only_ascii(tiny: Tiny) -> None:
    import os

    done = subprocess.run(
        [sys.executable, "-m", "tinier", "generate", str(tiny().folder), "--prompt", "x",
         "--max-tokens", "60", "--temperature", "1.5", "--quiet"],
        capture_output=True, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--keep-layers", "3", "--align", "0"], "align=0. Use 1 or more"),
        (["prune", "--target", "100M", "--candidates", "0"], "candidates=0. Use 1 or more"),
        (["quantize", "--preset", "int4-gptq", "--windows", "0"], "windows=0"),
        (["quantize", "--preset", "int4-gptq", "--length", "0"], "length=0"),
        (["quantize", "--preset", "mixed", "--bits", "inf"], "bits=inf. Use the bits"),
        (
            ["quantize", "--preset", "mixed", "--bits", "5", "--formats", "int4-gptq:²"],
            "is no format",
        ),
        (
            ["quantize", "--preset", "mixed", "--bits", "5", "--formats", ""],
            "preset '' is not known",
        ),
        (["quantize", "--preset", "fp8", "--bits", "5"], "--bits 5 is for --preset mixed"),
        (["quantize", "--preset", "fp8", "--seed", str(2**63)], f"--seed {2**63} is too large"),
        (["prune", "--drop-layers", "0-99999999999"], "no model has a layer 99999999999"),
        (["prune", "--keep-hidden", "²"], "is no size and no share"),
        (["export", "--to", "nothing"], "--to nothing is not known. Targets: tinier"),
    ],
)
def test_numbers_and_names_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    verb, *rest = arguments
    code, _, stderr = in_process(
        monkeypatch, capsys, verb, tiny().folder, "--out", tmp_path / "o", *rest
    )
    assert code == 2
    assert message in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heal-batch", "0"], "batch=0"),
        (["--heal-lr", "nan"], "lr=nan"),
        (["--heal-text", "nowhere"], "text source 'nowhere' is no file"),
        (["--rounds", "2"], "2 rounds for 1 layer"),
    ],
)
def test_a_dry_run_checks_the_healing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    common = ["prune", tiny().folder, "--keep-layers", "3", "--length", "64", "--heal-steps", "3",
              "--heal-batch", "2", "--out", tmp_path / "o", "--dry-run"]  # fmt: skip
    code, _, stderr = in_process(monkeypatch, capsys, *common, *arguments)
    assert code == 2
    assert message in stderr


@pytest.mark.parametrize(
    ("option", "value"),
    [("--teacher-store", "a file"), ("--tensorboard", "a file"), ("--top-k", 265)],
)
@pytest.mark.parametrize("dry", [True, False])
def test_distill_refuses_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path,
    option: str, value: object, dry: bool,
) -> None:  # fmt: skip
    source = tiny().folder
    (tmp_path / "a file").write_text("x")
    value = tmp_path / value if isinstance(value, str) else value
    more = ["--top-k", "4"] if option == "--teacher-store" else []
    code, _, stderr = in_process(
        monkeypatch, capsys, "distill", source, "--teacher", source, "--steps", "2", "--batch", "4",
        "--warmup-steps", "0", "--length", "32", "--out", tmp_path / "o", option, value, *more,
        *(["--dry-run"] if dry else []),
    )  # fmt: skip
    assert code == 2
    assert ("is more than the 264 tokens" if option == "--top-k" else "is a file. Give") in stderr
    assert not list(tmp_path.glob("*.training"))


def test_a_teacher_store_goes_with_top_k(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    source = tiny().folder
    code, _, stderr = in_process(
        monkeypatch, capsys, "distill", source, "--teacher", source, "--out", tmp_path / "o",
        "--teacher-store", tmp_path / "store", "--dry-run",
    )  # fmt: skip
    assert code == 2
    assert "--teacher-store keeps what --top-k stores. Add --top-k 64" in stderr


def test_healing_s_options_go_with_heal_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    folder = tiny().folder
    for option, value in (("--heal-batch", "8"), ("--heal-lr", "1e-4"), ("--heal-text", "x.txt")):
        code, _, stderr = in_process(
            monkeypatch, capsys, "prune", folder, "--keep-layers", "2", "--out", tmp_path / "o",
            option, value,
        )  # fmt: skip
        assert code == 2
        assert "are for healing. Give --heal-steps 100" in stderr


def test_eval_takes_options_of_mmlu_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny
) -> None:
    folder = tiny().folder
    for option, value in (("--subject", "astronomy"), ("--sample", "3")):
        code, _, stderr = in_process(monkeypatch, capsys, "eval", folder, option, value)
        assert code == 2
        assert "--subject and --sample are for --mmlu" in stderr


def test_no_model_is_not_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, stderr = in_process(monkeypatch, capsys, "generate", "", "--prompt", "x")
    assert code == 2
    assert "model '' is no folder" in stderr


@pytest.mark.parametrize("where", ["file", "proc", "source", "long"])
@pytest.mark.parametrize("dry", [True, False])
def test_outputs_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path,
    where: str, dry: bool,
) -> None:  # fmt: skip
    source = tiny().folder
    (tmp_path / "afile").write_text("x")
    out = {"file": tmp_path / "afile" / "o", "proc": Path("/proc/o"), "source": source,
           "long": tmp_path / ("x" * 300)}[where]  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    code, _, stderr = in_process(
        monkeypatch, capsys, "quantize", source, "--preset", "fp8", "--out", out,
        *(["--dry-run"] if dry else []),
    )  # fmt: skip
    assert code == 2
    assert "--out" in stderr
    assert "rm -r" not in stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_manifest_that_is_no_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny
) -> None:
    folder = tiny().folder
    (folder / "tinier.json").write_bytes(b"\xff\xfe{")
    code, _, stderr = in_process(monkeypatch, capsys, "eval", folder)
    assert code == 2
    assert "is not a tinier manifest" in stderr


def test_a_float16_model_that_overflows_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    write_overflowing: Callable[[Path], Path],
) -> None:  # fmt: skip
    folder = write_overflowing(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(DOCUMENTS))
    for arguments in (
        ["generate", folder, "--prompt", "abc", "--max-tokens", "4"],
        ["eval", folder, "--text", text, "--windows", "1", "--length", "64"],
        ["quantize", folder, "--preset", "int4-gptq", "--group-size", "32", "--text", text,
         "--length", "64", "--out", tmp_path / "o"],
        ["prune", folder, "--keep-layers", "3", "--text", text, "--length", "64", "--out", tmp_path / "o"],
    ):  # fmt: skip
        code, _, stderr = in_process(monkeypatch, capsys, *arguments, "--quiet")
        assert code == 2, arguments
        assert "layer" in stderr
        assert "float16" in stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["quantize", "m"], "the same command goes on where it was"),
        (["prune", "m"], "takes finished measurements from the cache"),
        (["eval", "m"], "stopped."),
    ],
)
def test_a_stopped_command_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tinier.families.open_model", stopped)
    needed = ["--out", "o", *(["--preset", "fp8"] if arguments[0] == "quantize" else [])]
    code, out, err = in_process(
        monkeypatch, capsys, *arguments, *(needed if arguments[0] != "eval" else [])
    )
    assert code == cli.INTERRUPTED
    assert told in err
    assert out == ""


def test_nobody_is_told_to_install_a_name_that_is_not_ours() -> None:
    """`tinier` on PyPI belongs to nobody known."""
    source = Path(cli.__file__).parents[1]
    for path in source.rglob("*.py"):
        assert "pip install 'tinier" not in path.read_text("utf-8"), path
        assert "pip install tinier" not in path.read_text("utf-8"), path
