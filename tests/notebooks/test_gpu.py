"""What `make gpu` makes of its parts, as far as can be seen without a GPU."""
import json
from pathlib import Path

import gpu
import torch


def fake_batch(out, names, failed=()):
    for name in names:
        folder = out / "notebooks" / name
        folder.mkdir(parents=True)
        result = {"status": "failed" if name in failed else "passed", "claims": 3, "seconds": 1.5,
                  "error": "AssertionError" if name in failed else None}
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def test_without_a_cuda_device_it_says_so_and_ends_well(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 0
    assert "no CUDA device" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_report_of_pytest_is_counted_and_what_failed_is_named(tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"><properties>'
        '<property name="seconds" value="0.5"/></properties></testcase><testcase name="b">'
        '<failure/></testcase><testcase name="c"><error/></testcase><testcase name="d"><skipped/>'
        '</testcase></testsuite></testsuites>', encoding="utf-8")
    assert gpu.read(report) == {"passed": 1, "skipped": 1, "failed": ["b", "c"],
                                "recorded": {"a": {"seconds": 0.5}}}
    assert gpu.read(tmp_path / "none.xml")["failed"] == ["no test passed"]


def test_a_notebook_that_failed_or_did_not_run_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "run", lambda *command, **environment: (0, 1.0))
    names = [path.stem for path in (Path(gpu.ROOT) / "notebooks").glob("*.ipynb")]
    fake_batch(tmp_path / "whole", names)
    assert gpu.notebooks(tmp_path / "whole", "cuda", 2)["failed"] == {}
    fake_batch(tmp_path / "one", names, failed=names[:1])
    assert gpu.notebooks(tmp_path / "one", "cuda", 2)["failed"] == {names[0]: "AssertionError"}
    fake_batch(tmp_path / "fewer", names[1:])
    assert "notebooks" in gpu.notebooks(tmp_path / "fewer", "cuda", 2)["failed"]


def test_the_parts_run_on_the_device_that_is_there(tmp_path, monkeypatch):
    """With a device that is made up, and nothing run: what is asked for, and what comes of it."""
    asked = []

    def run(*command, **environment):
        asked.append((" ".join(map(str, command)), environment))
        return 1, 2.0

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = type("About", (), {"name": "made up", "total_memory": 8e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    assert gpu.main(["--out", str(tmp_path)]) == 1  # nothing passed
    (tests, named), (batch, _), (bench, place) = asked
    assert "test_device.py" in tests and named["MYTHOS_DEVICE"] == "cuda"
    assert "--grid device=cuda" in batch and "-k cuda" in bench
    assert place["MYTHOS_FIGURES"] == str(tmp_path)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["device"] == "made up" and found["memory_GB"] == 8.0
    assert all(found[part]["failed"] for part in ("tests", "notebooks", "bench"))


def test_the_committed_run_passed_whole():
    found = json.loads((gpu.ROOT / "figures" / "gpu.json").read_text(encoding="utf-8"))
    assert not any(found[part]["failed"] for part in ("tests", "notebooks", "bench"))
    run = {name.partition("-device")[0] for name in found["notebooks"]["claims"]}
    since = {path.stem for path in (gpu.ROOT / "notebooks").glob("*.ipynb")} - run
    page = (gpu.ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    assert len(run) >= 9 and all(f"`{name}` has not run on a GPU" in page for name in since)
    assert found["seconds"] < 480 and found["command"] == "make gpu" and len(found["commit"]) == 40
