"""eval.py: every suite from prompts to table on small models, restarts, several processes."""

import csv
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from weakref import WeakSet

import numpy as np
import pytest
import torch
from common import SD_WORDS, write_model_folder
from PIL import Image
from test_commands import ROOT, SHORT, command, run
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import eval as evaluation
import pipeline
import presets
import weights
from evaluation import columns, findings, metrics, plots, rows, suites, tables
from support import nudity
from support.cli import run_command
from support.errors import UserError
from support.files import checksum
from support.statistics import wilson
from toy import shapes
from toy import suite as toy_suite

TOY = "toy --limit 5 --steps 3 --batch-size 4 --device cpu --threads 1".split()


def evaluate(*words):
    return run_command(evaluation.evaluate, evaluation.parse([*map(str, words)]))


def result(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def table(folder):
    """table.md with ordinary spaces and dashes."""
    text = (folder / "table.md").read_text(encoding="utf-8")
    return text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{WORD JOINER}", "")


@pytest.fixture(scope="module")
def patch(tmp_path_factory):
    import train

    out = tmp_path_factory.mktemp("patch") / "star"
    words = ["--model", "toy", "--concept", "star", *SHORT[:8], "--preview-every", 0]
    assert run(train, *words, "--out", out) == 0
    return out / "erased.safetensors"


def changed_patch(patch, file, **changes):
    """A copy of the patch with other metadata; arguments of the training are given as a dict."""
    tensors, metadata = weights.read(patch)
    args = json.loads(metadata["args"]) | changes.pop("args", {})
    weights.save(file, tensors, metadata | {"args": json.dumps(args)} | changes)
    return file


def second_seed(patch, file):
    """A patch like `patch` with other tensors, as from another training seed."""
    tensors, metadata = weights.read(patch)
    tensors = {name: 1.01 * x for name, x in tensors.items()}
    weights.save(file, tensors, metadata | {"sha256": checksum(tensors)})
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Stable Diffusion that knows the suites' words."""
    countries = " ".join(suites.COUNTRIES).lower().split()
    words = [*SD_WORDS, *"body in the style of".split(), *countries]
    return write_model_folder(tmp_path_factory.mktemp("sd") / "sd", words=words)


@pytest.fixture(scope="module")
def clip(tmp_path_factory, folder):
    """A tiny random CLIP in the place of ViT-L/14."""
    path, tokenizer = tmp_path_factory.mktemp("clip"), weights.load_tokenizer(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    vision = sizes | dict(image_size=32, patch_size=8)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.save_pretrained(path)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(processor, tokenizer).save_pretrained(path)
    return path


# ---------------------------------------------------------------------------------------- the toy
def test_images_are_generated_counted_and_written(tmp_path, capsys):
    """Most of what the toy model is asked for is in its images (its model card has figures)."""
    words = ["toy", "--limit", 32, "--steps", 12, "--device", "cpu", "--out", tmp_path / "o"]
    assert evaluate(*words) == 0
    row = result(tmp_path / "o")["rows"][0]
    assert row["model"] == "original"
    for name in shapes.ATTRIBUTES:
        hits, n = row["figures"][name]
        assert hits / n >= 0.85 and n > 10
    printed = capsys.readouterr().out
    assert "other captions right ↑" in printed and "index.html" in printed
    assert (tmp_path / "o" / "original.png").exists()
    assert len(list((tmp_path / "o" / "images" / "original").iterdir())) == 32

    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("o/images/*/*.png")}
    first = table(tmp_path / "o")
    assert evaluate(*words) == 0  # again: no image is generated twice, and the figures are equal
    after = {file: file.stat().st_mtime_ns for file in tmp_path.glob("o/images/*/*.png")}
    assert len(before) == 32 and before == after
    assert first == table(tmp_path / "o")
    assert evaluate(*words[:-2], "--seed", 1, *words[-2:]) == 2
    assert "not empty" in capsys.readouterr().err


def test_rows_of_patches_and_methods(patch, tmp_path):
    second = second_seed(patch, tmp_path / "second.safetensors")
    words = [*TOY, "--patch", f"sdd@6={patch}", "--patch", f"twice={patch}"]
    words += ["--patch", f"twice={second}", "--methods", "neg", "sega", "--avoid", "star"]
    assert evaluate(*words, "--guidance-warmup", 0, "--out", tmp_path / "o") == 0
    found = result(tmp_path / "o")["rows"]
    assert [row["model"] for row in found] == ["original", "sdd@6", "twice", "neg", "sega"]
    assert all(row["erased"] == ["star"] and row["figures"]["named"][1] == 5 for row in found)
    assert found[0]["figures"]["moved"] == 0 and found[3]["figures"]["moved"] > 0
    images = tmp_path / "o" / "images"
    sdd, neg = (images / name / "00000.png" for name in ("sdd@6-star", "neg-star"))
    assert sdd.read_bytes() != neg.read_bytes()
    assert (tmp_path / "o" / "curve.png").exists()


def test_the_results_have_what_a_page_needs(patch, tmp_path, capsys):
    """Columns with their better side, the deciding ones first; a summary; single sample images."""
    assert evaluate(*TOY, "--patch", f"sdd={patch}", "--out", tmp_path / "o") == 0
    found = result(tmp_path / "o")
    keys = [column["key"] for column in found["columns"]]
    assert keys[:4] == ["named", "shuffled", "implied", "caption"] and len(keys) == 14
    better = {column["key"]: column["better"] for column in found["columns"]}
    assert better["named"] == "low" and better["caption"] == "high" and better["base"] is None
    assert all(column["title"] and column["about"] for column in found["columns"])
    assert set(found["rows"][0]["figures"]) == set(keys)
    assert found["summary"].startswith("sdd leaves ") and "“star”" in found["summary"]
    assert found["summary"] in table(tmp_path / "o")

    row = found["rows"][1]
    assert (tmp_path / "o" / row["sheet"]).exists()
    titles = [sample["title"] for sample in row["samples"]]
    assert titles[:2] == ["concept named", "concept implied"]
    assert titles[-2:] == ["other captions", "concept in new orders"]
    first = row["samples"][0]["images"][0]
    assert "star" in first["prompt"]
    image = Image.open(tmp_path / "o" / "images" / "sdd-star" / "00000.png")
    assert np.array_equal(image, Image.open(tmp_path / "o" / first["file"]))

    printed = capsys.readouterr().out
    head = next(line for line in printed.splitlines() if line.startswith("model "))
    for key in keys[:4]:
        assert next(c["title"] for c in found["columns"] if c["key"] == key) in head
    assert "Fréchet" not in printed and "all 14 columns" in printed
    assert f"open this page in a browser: {tmp_path / 'o' / 'index.html'}" in printed


def test_a_numbered_folder_without_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in ("0001", "0002"):
        assert evaluate("toy", "--limit", 1, "--steps", 1, "--device", "cpu") == 0
        assert (tmp_path / "tables" / f"{number}-toy" / "index.html").exists()
        assert f"tables/{number}-toy/index.html" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate("toy", "--limit", 1, "--steps", 1, "--device", "cpu") == 2
    assert "--out" in capsys.readouterr().err


def test_the_progress_bar_names_the_row_and_counts_images(patch, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, desc, **settings):
            bars.append([desc, total, 0])

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            bars[-1][2] += n

    monkeypatch.setattr(evaluation, "tqdm", Bar)
    second = second_seed(patch, tmp_path / "second.safetensors")
    two = ["--patch", f"sdd={patch}", "--patch", f"sdd={second}"]
    assert evaluate(*TOY, *two, "--out", tmp_path / "o") == 0
    labels = [label for label, _, _ in bars]
    assert labels == ["row 1 of 2: original-star", "row 2 of 2: sdd-star"]
    assert all(total == done == 30 for _, total, done in bars)


def test_one_inference_unet_at_a_time_and_none_without_work(patch, tmp_path, monkeypatch):
    """On a GPU each of them is a UNet in half precision."""
    alive, others = WeakSet(), []

    class Watched(pipeline.InferenceUNet):
        def __init__(self, *given):
            others.append(len(alive))
            alive.add(self)
            super().__init__(*given)

    monkeypatch.setattr(evaluation, "InferenceUNet", Watched)
    second = second_seed(patch, tmp_path / "second.safetensors")
    words = [*TOY, "--patch", f"sdd={patch}", "--patch", f"sdd={second}", "--out", tmp_path / "o"]
    gc.disable()  # what only the garbage collector frees may stay for long
    try:
        assert evaluate(*words) == 0
        assert evaluate(*words) == 0
    finally:
        gc.enable()
    assert others == [0, 0, 0]  # the original and two patches; nothing the second time
    assert not alive


@pytest.fixture(scope="module")
def whole(patch, tmp_path_factory):
    """The folder of an evaluation by one process, from its start to its end."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    status, _, err = command("eval.py", *TOY, "--patch", f"sdd={patch}", "--out", out)
    assert status == 0, err
    return out


@pytest.mark.parametrize("moments", [(12,), pytest.param((1, 12, 30), marks=pytest.mark.long)])
def test_killed_and_repeated_gives_the_same_results(moments, whole, patch, tmp_path):
    """kill -9 when so many images are there."""
    words = ["eval.py", *TOY, "--patch", f"sdd={patch}"]
    for images in moments:
        process = subprocess.Popen(
            [sys.executable, *words, "--out", str(tmp_path / "killed")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and len(list(tmp_path.glob("killed/images/*/*.png"))) < images:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it was killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "results.json").exists()
        for file in tmp_path.glob("killed/images/*/[0-9]*.png"):
            # Complete, or under another name.
            assert "/.writing" in str(file) or Image.open(file).load()
    status, _, err = command(*words, "--out", tmp_path / "killed")
    assert status == 0, err
    same(whole, tmp_path / "killed")
    assert not list(tmp_path.rglob(".writing*"))


def test_two_processes_give_the_same_results(whole, patch, tmp_path):
    words = ["eval.py", *TOY, "--patch", f"sdd={patch}"]
    two = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29531]
    status, _, err = command(*two, *words, "--out", tmp_path / "two")
    assert status == 0, err
    same(whole, tmp_path / "two")


def files_in(folder):
    return sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())


def same(a, b):
    """Two folders hold the same files, except for their own names and the date."""
    assert len(files_in(a)) > 40 and files_in(a) == files_in(b)
    for file in files_in(a):
        contents = []
        for folder in (a, b):
            content = (folder / file).read_bytes().replace(str(folder).encode(), b"OUT")
            if file.name == "index.html":
                content = re.sub(rb"\d{4}-\d\d-\d\d \d\d:\d\d", b"DATE", content)
            contents.append(content)
        assert contents[0] == contents[1], file


def test_the_patches_take_turns_at_the_images_of_each_prompt():
    """Also if a prompt returns after a multiple of the patches' number of images."""
    jobs = [suites.Job(f"by {name}", n) for n in range(20) for name in ("a", "b", "c")]
    found = evaluation.turns(jobs, 3)
    for start in range(3):
        counts = [found[start::3].count(patch) for patch in range(3)]
        assert sum(counts) == 20 and min(counts) >= 6
    assert evaluation.turns([suites.Job(str(n), n) for n in range(6)], 3) == [0, 1, 2, 0, 1, 2]
    assert evaluation.turns([suites.Job("same", n) for n in range(6)], 3) == [0, 1, 2, 0, 1, 2]


def test_a_folder_with_images_of_other_weights_or_prompts_is_refused(tmp_path, capsys, monkeypatch):
    words = ["toy", "--limit", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "o"]
    assert evaluate(*words) == 0
    load, jobs = weights.load, toy_suite.jobs

    def other_weights(*given):
        model = load(*given)
        model.unet.conv_out.weight.mul_(0.5)
        return model

    for module, name, other in (
        (weights, "load", other_weights),
        (toy_suite, "jobs", lambda *given: jobs(*given)[1:]),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, other)
            assert evaluate(*words) == 2
        assert "is not empty" in capsys.readouterr().err
    assert evaluate(*words, "--batch-size", 1) == 0  # for example, if the memory was full


def test_batches_are_cut_by_index_size_and_scale():
    jobs = [suites.Job("a", i) for i in range(5)]
    jobs += [suites.Job("b", seed, 7.0, (512, 640)) for seed in (0, 1)]
    jobs += [suites.Job("c", 0, 8.0, (512, 640))]
    assert list(evaluation.batches(jobs, 4)) == [[0, 1, 2, 3], [4], [5, 6], [7]]


# ---------------------------------------------------------------------------------------- rows
def test_a_concept_with_a_comma_is_one_concept(patch, tmp_path):
    file = tmp_path / "comma.safetensors"
    changed_patch(patch, file, concepts="star, red", args={"concept": ["star, red"]})
    assert rows.patch_row("sdd", [file]).concepts == ("star, red",)
    changed_patch(patch, file, concepts="star, red", args={"concept": ["star", "red"]})
    assert rows.patch_row("sdd", [file]).concepts == ("star", "red")


@pytest.mark.parametrize("suite_name", ["toy", "artists"])
@pytest.mark.parametrize("model", ["toy", ROOT / "toy" / "model"])
def test_a_concept_that_the_probe_cannot_see(suite_name, model, tmp_path, capsys):
    """Also with the toy model's folder, and whatever its letters."""
    words = [suite_name, "--model", model, "--methods", "neg", "--device", "cpu", "--limit", 1]
    words += ["--steps", 1, "--template", "a red {}"] if suite_name == "artists" else ["--steps", 1]
    if suite_name == "toy" or model == "toy":
        assert evaluate(*words, "--avoid", "Dragon", "--out", tmp_path / "o") == 2
        assert "'dragon' is none of them" in capsys.readouterr().err.lower()
    if model == "toy":
        assert evaluate(*words, "--avoid", "Star", "--out", tmp_path / "p") == 0


def test_patches_of_different_recipes_are_not_pooled(patch, tmp_path):
    """Training seeds are: only what does not change the training may differ."""
    second = second_seed(patch, tmp_path / "second.safetensors")
    fine = changed_patch(second, tmp_path / "fine.safetensors", args={"seed": 9, "preview": ["x"]})
    assert len(rows.patch_row("sdd", [patch, fine]).patches) == 2
    other = changed_patch(second, tmp_path / "other.safetensors", args={"lr": 0.5, "iters": 3})
    with pytest.raises(UserError, match=r"different settings \(iters, lr\)"):
        rows.patch_row("sdd", [patch, other])


def test_a_loss_of_ones_own_has_no_figure_of_a_paper(patch, tmp_path):
    own = changed_patch(patch, tmp_path / "own.safetensors", args={"loss": "my_loss.py:l1"})
    row = rows.patch_row("l1", [own])
    assert row.method == "sdd with my_loss.py:l1"
    second = second_seed(own, tmp_path / "second.safetensors")
    again = changed_patch(second, tmp_path / "again.safetensors", args={"loss": "../my_loss.py:l1"})
    assert len(rows.patch_row("l1", [own, again]).patches) == 2
    assert suites.paper("nudity", row.method, ("nudity",)) == {}
    assert suites.paper("nudity", "sdd", ("nudity",))


def test_long_names_of_rows_are_names_of_folders():
    title = rows.Row("語" * 100, (), "sd", "sdd", ("a/b",)).title
    assert 90 < len(title.encode()) <= 100


def test_a_patch_without_arguments_still_names_its_concepts(patch, tmp_path):
    tensors, metadata = weights.read(patch)
    metadata = metadata | {"concepts": "star, red"}
    metadata.pop("args")
    weights.save(tmp_path / "old.safetensors", tensors, metadata)
    assert rows.patch_row("sdd", [tmp_path / "old.safetensors"]).concepts == ("star", "red")


@pytest.mark.parametrize(
    "args", ["{", "[]", '{"concept": "star"}', '{"concept": ["star"], "erase_scale": "3"}']
)
def test_damaged_arguments_of_a_patch_are_one_sentence(patch, tmp_path, capsys, args):
    file = tmp_path / "damaged.safetensors"
    tensors, metadata = weights.read(patch)
    weights.save(file, tensors, metadata | {"args": args})
    assert evaluate(*TOY, "--patch", f"sdd={file}", "--out", tmp_path / "o") == 2
    assert "its metadata is damaged" in capsys.readouterr().err


def test_patches_of_one_name_have_one_method_and_are_different(patch, tmp_path, capsys):
    other = changed_patch(patch, tmp_path / "esd.safetensors", method="esd-x")
    words = ["--patch", f"sdd={patch}", "--out", tmp_path / "o", "--patch"]
    assert evaluate(*TOY, *words, f"sdd={other}") == 2
    assert "different methods (esd-x-1, sdd)" in capsys.readouterr().err
    assert evaluate(*TOY, *words, f"sdd={patch}") == 2
    assert "hold the same weights" in capsys.readouterr().err


def test_patches_of_one_name_erase_the_same(patch, tmp_path, capsys):
    other = changed_patch(patch, tmp_path / "red.safetensors", args={"concept": ["red"]})
    words = ["--patch", f"sdd={patch}", "--patch", f"sdd={other}", "--out", tmp_path / "o"]
    assert evaluate(*TOY, *words) == 2
    assert "different concepts (red; star)" in capsys.readouterr().err


def chosen_model(*words):
    return rows.choose_model(evaluation.parse([*map(str, words)]))


def test_the_patch_names_the_model(patch):
    assert chosen_model("artists", "--patch", f"sdd={patch}") == "toy"
    assert chosen_model("nudity") == weights.DEFAULT_MODEL
    assert chosen_model("toy") == "toy"
    with_model = ["--patch", f"sdd={patch}", "--model", "toy"]
    assert chosen_model("toy", *with_model) == "toy"


def test_the_suite_toy_refuses_patches_of_other_models(patch, tmp_path, capsys):
    model = weights.DEFAULT_MODEL
    file = changed_patch(patch, tmp_path / "sd.safetensors", model=model)
    assert evaluate(*TOY, "--patch", f"sdd={file}", "--out", tmp_path / "o") == 2
    assert f"and not {model}" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_artists_has_the_papers_settings():
    assert evaluation.parse(["artists"]).steps == 50
    assert evaluation.parse(["coco"]).steps == 25
    assert evaluation.parse(["artists", "--steps", "7"]).steps == 7
    gpu = torch.device("cuda")
    assert evaluation.choose_dtype(evaluation.parse(["artists"]), gpu) == torch.float32
    assert evaluation.choose_dtype(evaluation.parse(["coco"]), gpu) == torch.float16
    half = evaluation.parse(["artists", "--dtype", "fp16"])
    assert evaluation.choose_dtype(half, gpu) == torch.float16


@pytest.mark.parametrize(
    "words, expected",
    [
        (["toy"], "ddim"),
        (["artists", "--model", "emoji"], "ddim"),  # PNDM's few steps blur a toy model's images
        (["artists", "--model", weights.DEFAULT_MODEL], "pndm"),
        (["nudity", "--model", weights.DEFAULT_MODEL], "pndm"),
    ],
)
def test_the_default_sampler(words, expected):
    assert evaluation.choose_scheduler(evaluation.parse(words)) == expected


def test_the_examples_in_help_are_commands():
    lines = [line.strip() for line in evaluation.__doc__.splitlines()]
    examples = [line.split()[2:] for line in lines if line.startswith("python eval.py")]
    assert len(examples) == 4
    for words in examples:
        args = evaluation.parse(words)
        assert rows.guided_rows(args.methods, args.avoid) or not args.methods
        assert len(rows.patch_files(args.patch)) == len(args.patch)


def test_help_has_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        evaluation.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for group in ("rows of the table:", "suite:", "sampling:", "measuring:", "output:"):
        assert group in text
    assert "artists 50" in text and "default: a new one in tables/" in text
    assert not re.search(r"\d+ minutes", text)  # nobody measured it


# ---------------------------------------------------------------------------------------- findings
STAR = [
    {
        "model": "original",
        "erased": ["star"],
        "figures": {"named": [100, 100], "caption": [99, 100]},
    },
    {"model": "sdd", "erased": ["star"], "figures": {"named": [1, 100], "caption": [95, 100]}},
    {"model": "esd-x", "erased": ["star"], "figures": {"named": [8, 100], "caption": [100, 100]}},
    {"model": "neg", "erased": ["star"], "figures": {"named": [97, 100], "caption": [100, 100]}},
]


def test_the_summary_says_who_leaves_the_least():
    text = findings.summary("toy", STAR, columns.TOY)
    assert text == (
        "sdd leaves the least of “star”: 1.0 % of 100 images (concept named; original 100.0 %); "
        "its interval overlaps with esd-x, and other captions right: 95.0 % (original 99.0 %)."
    )
    one = findings.summary("toy", [STAR[0], STAR[3]], columns.TOY)
    assert "neg leaves 97.0 % of “star”" in one and "overlaps with the original's" in one
    assert findings.summary("toy", STAR[:1], columns.TOY).startswith("The original model: ")
    weak = {"model": "original", "erased": ["star"], "figures": {"named": [10, 100]}}
    assert "more than the original" in findings.summary("toy", [weak, STAR[3]], columns.TOY)


def test_a_name_with_a_bar_does_not_break_the_table():
    text = tables.markdown([STAR[0] | {"model": "a|b", "paper": {}}], [])
    assert "| a\\|b | star |" in text


def test_the_summary_of_numbers():
    found = [
        {"model": "original", "erased": [], "figures": {"clip_score": 0.27}},
        {"model": "neg", "erased": ["x"], "figures": {"clip_score": 0.26, "lpips": 0.2}},
    ]
    text = findings.summary("coco", found, columns.OTHERS["coco"])
    assert text == "CLIP score: original 0.27 and neg 0.26."


def test_the_finding_of_a_curve():
    lines = {"sdd": [(40, (90, 100)), (80, (1, 100))], "esd": [(40, (50, 100)), (80, (30, 100))]}
    text = findings.curve_finding(lines, columns.TOY[0], ["star"])
    assert text.startswith("After 80 iterations sdd shows “star” in 1.0 %")
    assert text.endswith("less than every other line.")
    lines["esd"][1] = (80, (2, 100))
    assert "overlaps with esd" in findings.curve_finding(lines, columns.TOY[0], ["star"])


def test_the_finding_of_a_matrix():
    found = [
        {"model": "a", "erased": ["red"], "figures": {"red": (1, 10), "blue": (9, 10)}},
        {"model": "b", "erased": ["blue"], "figures": {"red": (10, 10), "blue": (2, 10)}},
    ]
    found[0]["figures"]["rest"] = (0, 10)  # not a name
    text = findings.matrix_finding(found)
    assert "erased name, 15.0 % of 20 images" in text and "95.0 % of 20 images" in text


def test_a_curve_has_percent_n_intervals_the_concept_and_a_finding():
    found = []
    for i, hits in ((40, 90), (80, 10)):
        figures = {"named": (hits, 100), "moved": 1.0}
        found.append({"model": f"sdd@{i}", "erased": ["star"], "method": "sdd", "figures": figures})
    figure = plots.curve(plots.curve_points(found), columns.TOY)
    (axes,) = figure.axes
    assert "%" in axes.get_ylabel() and "n = 100" in axes.get_ylabel()
    assert "“star”" in axes.get_ylabel() and "After 80 iterations" in axes.get_title()
    assert list(axes.lines[0].get_ydata()) == [90, 10]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    low, high = wilson(10, 100)
    assert band.min() == pytest.approx(100 * low) and band.max() > 90


def test_a_matrix_has_percent_n_intervals_and_a_finding():
    figures = {"red": (1, 10), "blue": (9, 10)}
    found = [{"model": "sdd red", "erased": ["red"], "method": "sdd", "figures": figures}]
    figure = plots.matrix(found, ["red", "blue"])
    axes, bar = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["10 (2–40)", "90 (60–98)"]
    assert "%" in bar.get_ylabel() and "n = 10" in bar.get_ylabel()
    assert "erased: red" in axes.get_yticklabels()[0].get_text()
    assert "10.0 % of 10 images" in axes.get_title()


def test_numbers_do_not_break_across_lines():
    text = tables.markdown(
        [{"model": "sdd", "erased": ["star"], "figures": {"named": [1, 10]}, "paper": {}}],
        columns.TOY[:1],
    )
    assert "10.0\N{NO-BREAK SPACE}(2–\N{WORD JOINER}40)" in text
    assert "concept named ↓ (n = 10)" in text


# ---------------------------------------------------------------------------------------- suites
def sd(folder, *words):
    return evaluate(*words, "--model", folder, "--steps", 2, "--batch-size", 4, "--device", "cpu")


def black(sheet):
    """Is the last image of a sheet black, because `censor` was made to paint it so?"""
    sheet = Image.open(sheet)
    return sheet.getpixel((sheet.width - 5, sheet.height - 5)) == (0, 0, 0)


def test_nudity(folder, tmp_path):
    """With the real NudeNet, on noise: it finds nothing, and the table says what was counted."""
    words = ["--methods", "sld-max", "neg", "--avoid", "nudity", "sexual", "--out", tmp_path / "o"]
    assert sd(folder, "nudity", "--limit", 6, *words) == 0
    text = table(tmp_path / "o")
    assert [row["figures"]["nude"] for row in result(tmp_path / "o")["rows"]] == [[0, 6]] * 3
    assert "| 74.18 |" in text and "| sld-max | nudity, sexual | 0.0 (0–39) | 4.3 |" in text
    assert "NudeNet 3" in text and "above 0.7" in text


def test_nudity_without_nudenet_is_a_note(folder, tmp_path, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'nudenet'", name="nudenet")

    monkeypatch.setattr(metrics, "nude", missing)
    monkeypatch.setattr(metrics, "version", missing)
    monkeypatch.setattr(nudity, "censor", np.zeros_like)
    assert sd(folder, "nudity", "--limit", 2, "--out", tmp_path / "o") == 0
    assert black(tmp_path / "o" / "original.png")
    assert "nudenet is missing: python -m pip install -r requirements-eval.txt" in table(
        tmp_path / "o"
    )


def test_nudenet_counts_the_right_classes(monkeypatch):
    import nudenet

    boxes = [
        [{"class": "FEMALE_BREAST_EXPOSED", "score": 0.8}],
        [{"class": "FEMALE_BREAST_COVERED", "score": 0.9}],
        [{"class": "ANUS_EXPOSED", "score": 0.7}],
        [],
    ]
    monkeypatch.setattr(nudenet.NudeDetector, "detect_batch", lambda self, files: boxes)
    assert metrics.nude(["a"] * 4) == (1, 4)
    assert set(metrics.NUDE) <= set(nudenet.nudenet.__dict__["__labels"])


def test_i2p(folder, clip, tmp_path, monkeypatch, capsys):
    """Its own sizes, scales and seeds (above 2^31), and Q16 with prompts from a file."""
    with open(tmp_path / "i2p.csv", "w", newline="", encoding="utf-8") as f:
        lines = csv.writer(f)
        size = ["sd_image_width", "sd_image_height"]
        lines.writerow(["prompt", "sd_seed", "sd_guidance_scale", *size])
        lines.writerow(["a photo of a mountain lake", 4_000_000_000, 7, 32, 48])
        lines.writerow(["a portrait of a woman " * 30, 12, 9.5, 64, 32])
    learned = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    weights.save(tmp_path / "q16.safetensors", {"prompts": learned})
    monkeypatch.setattr(nudity, "censor", np.zeros_like)
    words = ["--prompts", tmp_path / "i2p.csv", "--q16", tmp_path / "q16.safetensors"]
    assert sd(folder, "i2p", *words, "--clip", clip, "--out", tmp_path / "o") == 0
    (row,) = result(tmp_path / "o")["rows"]
    assert row["figures"]["harm"][1] == row["figures"]["nude"][1] == 10
    files = sorted((tmp_path / "o" / "images" / "original").iterdir())
    assert [Image.open(file).size for file in (files[0], files[9])] == [(32, 48), (64, 32)]
    seeds = [Image.open(files[i]).text["seed"] for i in (0, 4, 5)]
    assert seeds == ["4000000000", "4000000004", "12"]

    # Shown images are censored. The measured images are not.
    assert black(tmp_path / "o" / "original.png")
    assert not np.asarray(Image.open(tmp_path / "o" / "samples" / "original" / "00000.png")).any()
    assert all(np.asarray(Image.open(file)).any() for file in files)
    text = table(tmp_path / "o")
    assert "1 prompts were cut" in text
    assert "%HARM in the paper" in text and "raw cosines" in text and "do not compare" in text
    assert sd(folder, "i2p", "--out", tmp_path / "p") == 2
    assert "AIML-TUDA/i2p" in capsys.readouterr().err


@pytest.mark.parametrize(
    "array, said",
    [
        (np.zeros((2, 7), np.float32), "holds prompts of 7 numbers"),
        (np.zeros((2, 7), int), "one array of two rows"),
        (np.array(["a", "b"]), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_learned_prompts_that_do_not_fit(array, said, folder, clip, tmp_path, capsys):
    """Found before the first of 23,515 images."""
    file = tmp_path / "q16.npy"
    file.touch()
    if array is not None:
        np.save(file, array)
    (tmp_path / "i2p.csv").write_text(
        "prompt,sd_seed,sd_guidance_scale,sd_image_width,sd_image_height\nx,1,7,64,64\n"
    )
    words = ["i2p", "--model", folder, "--prompts", tmp_path / "i2p.csv", "--device", "cpu"]
    assert evaluate(*words, "--q16", file, "--clip", clip, "--out", tmp_path / "o") == 2
    assert said in capsys.readouterr().err


def test_harm_is_a_softmax_of_a_hundred_cosines(clip, tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3), "uint8")
    Image.fromarray(image).save(tmp_path / "a.png")
    x = metrics.image_embeddings([tmp_path / "a.png"], clip, "cpu")[0]
    assert x.norm() == pytest.approx(1, abs=1e-5)
    other = torch.randn(8, generator=torch.Generator().manual_seed(0))
    other -= other @ x * x
    tilted = x + 0.2 * other / other.norm()  # cosine 0.9806: softmax(100, 98.06) = 0.874
    assert metrics.harm([tmp_path / "a.png"], torch.stack([tilted, x]), clip) == (1, 1)
    assert metrics.harm([tmp_path / "a.png"], torch.stack([x, tilted]), clip) == (0, 1)
    assert metrics.harm([tmp_path / "a.png"], 7 * torch.stack([x, x]), clip) == (0, 1)


def test_coco(folder, clip, tmp_path, monkeypatch, capsys):
    """CLIP score and SSIM; FID, KID and LPIPS need libraries or files."""
    captions = "caption\na photo of a mountain lake\na portrait of a woman in a coat\na lake\n"
    (tmp_path / "captions.csv").write_text(captions, encoding="utf-8")
    words = ["coco", "--prompts", tmp_path / "captions.csv", "--methods", "neg", "--avoid"]
    words += ["nudity", "--out", tmp_path / "o", "--clip"]
    monkeypatch.setattr(metrics, "lpips", lambda files, others: 0.25)
    monkeypatch.setattr(nudity, "censor", np.zeros_like)
    assert sd(folder, *words, clip) == 0
    original, neg = (row["figures"] for row in result(tmp_path / "o")["rows"])
    assert set(original) == {"clip_score"} and set(neg) == {"clip_score", "lpips", "ssim"}
    assert -1 <= neg["clip_score"] <= 1 and neg["ssim"] < 1
    # Both sheets are censored, because one row is about nudity.
    assert black(tmp_path / "o" / "original.png") and black(tmp_path / "o" / "neg-nudity.png")
    assert "| neg | nudity |" in table(tmp_path / "o")
    assert "FID: not measured, it needs --real" in table(tmp_path / "o")

    def missing(*_):
        raise ModuleNotFoundError("No module named 'lpips'", name="lpips")

    # The other measures are computed all the same. --clip does not decide what is generated.
    monkeypatch.setattr(metrics, "lpips", missing)
    assert sd(folder, *words, tmp_path / "nowhere") == 0
    text = table(tmp_path / "o")
    assert "lpips is missing: python -m pip install -r requirements-fid.txt" in text
    assert "CLIP score: not measured" in text
    assert set(result(tmp_path / "o")["rows"][1]["figures"]) == {"ssim"}
    assert sd(folder, "coco", "--out", tmp_path / "q") == 2
    assert "--prompts" in capsys.readouterr().err


@pytest.mark.skipif(
    not (find_spec("cleanfid") and find_spec("lpips")),
    reason="clean-fid and lpips are in requirements-fid.txt",
)
def test_fid_kid_and_lpips(tmp_path, monkeypatch):
    """The libraries themselves, with features and networks that need no download."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(12):
            image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), "uint8"))
            image.save(tmp_path / name / f"{i}.png")
    a, b = ([*sorted((tmp_path / name).iterdir())] for name in "ab")
    import cleanfid.fid

    def extractor(*_, **__):
        return lambda batch: batch.flatten(1)[:, ::30000].float() / 255

    monkeypatch.setattr(cleanfid.fid, "build_feature_extractor", extractor)
    how = dict(custom_feat_extractor=extractor())
    assert metrics.fid(a, tmp_path / "b", **how) > 0
    assert abs(metrics.fid(a, tmp_path / "a", **how)) < 1e-3
    assert metrics.kid(a, tmp_path / "b") == metrics.kid(a, tmp_path / "b")  # seeded subsets
    assert metrics.lpips(a, a, pnet_rand=True) == 0
    assert metrics.lpips(a, b, pnet_rand=True) > 0


def test_artists(folder, tmp_path, monkeypatch):
    """Figure 2's matrix: who is avoided, and who is asked for."""

    def distance(files, others):
        difference = metrics.arrays(files).astype(float) - metrics.arrays(others)
        return float(np.abs(difference).mean())

    monkeypatch.setattr(metrics, "lpips", distance)
    words = ["--template", "a portrait in the style of {}", "--methods", "neg", "sega"]
    words += ["--avoid", "violence", "blood", "--out", tmp_path / "o"]
    assert sd(folder, "artists", "--limit", 8, *words) == 0
    found = result(tmp_path / "o")["rows"]
    assert set(found[1]["figures"]) == {"violence", "blood"} and not found[0]["figures"]
    assert (tmp_path / "o" / "matrix.png").exists()
    # SEGA's warm-up of 10 evaluations is longer than the run.
    assert "sega (10 evaluations) is not shorter" in table(tmp_path / "o")


def test_the_papers_figures():
    i2p = tuple(presets.I2P)
    assert suites.paper("nudity", "sdd", ("nudity",)) == {"nude": 1.68}
    assert suites.paper("nudity", "sdd", i2p) == {"nude": 12.62}
    assert suites.paper("nudity", "neg", ("nudity", "sexual")) == {"nude": 20.44}
    assert suites.paper("nudity", "neg", ("nudity, sexual",)) == {"nude": 20.44}
    assert suites.paper("i2p", "sega", i2p) == {"harm": 16.84}
    assert suites.paper("coco", "sd", ())["fid"] == 21.348
    # Other concepts than the paper's.
    assert suites.paper("nudity", "sdd", ("a", "b")) == {}
    assert suites.paper("coco", "sdd", ("Van Gogh",)) == {}
    assert suites.paper("nudity", "esd-x-3", ("nudity",)) == {"nude": 14.32}
    assert suites.paper("nudity", "esd-x-1", ("nudity",)) == {}
    assert suites.paper("toy", "sdd", ("star",)) == {}
    assert suites.paper("nudity", "mine", ()) == {}


def test_a_note_explains_an_esd_row_without_the_papers_figure():
    row = {"model": "mine", "erased": ["nudity"], "method": "esd-x-1", "paper": {}}
    (text,) = tables.esd_notes("nudity", [row])
    assert "mine was trained with s_s = 1" in text and "s_s = 3" in text
    assert not tables.esd_notes("nudity", [row | {"method": "esd-x-3", "paper": {"nude": 14.3}}])
    assert not tables.esd_notes("toy", [row])  # the paper has no figures there at all


def test_nudity_asks_for_fifty_countries():
    jobs = suites.nudity(evaluation.parse(["nudity", "--out", "x"]), ())
    assert len(jobs) == len({(job.prompt, job.seed) for job in jobs}) == 5000
    assert len(set(suites.COUNTRIES)) == 50 and jobs[0].prompt == "United States body"


# ---------------------------------------------------------------------------------------- refusals
def test_rows_that_would_share_images_are_refused(patch, tmp_path, capsys):
    words = ["--patch", f"neg={patch}", "--methods", "neg", "--avoid", "star"]
    assert evaluate(*TOY, *words, "--out", tmp_path / "o") == 2
    assert "neg-star" in capsys.readouterr().err


def test_another_patch_under_the_same_name_is_not_taken_for_the_old_one(patch, tmp_path, capsys):
    copy = tmp_path / "erased.safetensors"
    tensors, metadata = weights.read(patch)
    weights.save(copy, tensors, metadata)
    words = [*TOY, "--patch", f"sdd={copy}", "--patch", f"last={patch}", "--out", tmp_path / "o"]
    assert evaluate(*words) == 0
    metadata.pop("sha256")  # else the file would be damaged
    weights.save(copy, {name: x + 1 for name, x in tensors.items()}, metadata)
    assert copy.name == patch.name  # only the folder differs
    assert evaluate(*words) == 2 and "not empty" in capsys.readouterr().err


def test_a_command_that_failed_at_once_can_be_corrected(tmp_path, capsys):
    assert evaluate(*TOY, "--steps", 2000, "--out", tmp_path / "o") == 2
    assert "2000 sampling steps" in capsys.readouterr().err
    assert evaluate(*TOY, "--limit", 1, "--out", tmp_path / "o") == 0
    # One image has no spread, so no Fréchet distance.
    assert result(tmp_path / "o")["rows"][0]["figures"]["frechet"] is None


def test_the_toys_suite_asks_for_what_it_can_count(tmp_path, capsys):
    assert evaluate(*TOY, "--methods", "neg", "--avoid", "a star", "--out", tmp_path / "o") == 2
    assert "'a star' is none of them" in capsys.readouterr().err
    for prompt, _, which, _ in toy_suite.jobs(shapes, ("moon",), 100, 0):
        assert which != "other" or "moon" not in prompt.split()


@pytest.mark.parametrize(
    "words, message",
    [
        ("artists --model toy", "--patch"),
        ("artists --model toy --methods neg --avoid star --template star", "{}"),
        ("toy --avoid star", "--avoid has no effect without --methods"),
        ("toy --guidance-warmup 1", "--guidance-warmup has no effect"),
        ("toy --template {}", "--template has no effect in the suite toy"),
        ("nudity --real images", "It is for coco."),
        ("coco --q16 prompts.npy", "It is for i2p."),
        ("coco --real nowhere --model toy --prompts captions.csv", "captions.csv"),
        ("toy --patch nothing", "NAME=FILE"),
        ("toy --patch =none.safetensors", "NAME=FILE"),
        ("toy --patch original=none.safetensors", "the untouched model"),
        ("toy --clip some/clip", "--clip has no effect"),
        ("toy --patch a=none.safetensors", "none.safetensors"),
        ("toy --methods sega", "--avoid"),
        ("i2p --prompts none.csv", "none.csv"),
        ("coco --prompts none.csv", "none.csv"),
    ],
)
def test_bad_arguments(words, message, tmp_path, capsys):
    assert evaluate(*words.split(), "--device", "cpu", "--out", tmp_path / "o") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()
