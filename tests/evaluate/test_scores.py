"""`evaluate NAME import`: scores as the benchmarks define them, worked out here from made-up
verdicts; incomplete results are refused."""

import csv
import io
import json
import math

import official
import pytest

from blip3o_jax.cli import main
from blip3o_jax.evaluate.exporters.record import Export
from blip3o_jax.evaluate.exporters.table import BENCHMARKS

MAKERS = {
    **{"geneval": official.geneval, "geneval2": official.geneval2, "dpg": official.dpg},
    **{"wise": official.wise, "oneig": official.oneig, "longtext": official.longtext},
    **{"tiif-mini": official.tiif, "imgedit": official.imgedit, "gedit": official.gedit},
    "wise-legacy": lambda folder: official.wise(folder, "", (400, 700, 1000)),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """What an export of each benchmark knows when its results come."""

    def export(name):
        prompts, _ = MAKERS[name](tmp_path_factory.mktemp("official") / "x")
        return Export(BENCHMARKS[name].read(prompts, "mine"), "mine")

    return {name: export(name) for name in MAKERS}


def record(name, export, folder, results, *more):
    """The exit code of `import` for these results."""
    about = {"benchmark": name, "model_name": "mine", "checkpoint": "painter", "num_images": 4}
    about |= {"settings": {"top_k": 9}, "seed": 42, "prompt_variant": "rewritten"}
    items = [vars(item) for item in export.items]
    (folder / "export.json").write_text(json.dumps(about | {"prompts_sha256": "5", "items": items}))
    argv = ["evaluate", name, "import", "--export", str(folder), "--judge-version", "v1"]
    paths = results if isinstance(results, list) else [results]
    argv += ["--out", str(folder / "result.json"), "--results", *map(str, paths), *more]
    return main(argv)


def scores(name, exports, folder, results, *more):
    assert record(name, exports[name], folder, results, *more) == 0
    return json.loads((folder / "result.json").read_text())["scores"]


def refused(name, exports, folder, results, capsys, *more):
    assert record(name, exports[name], folder, results, *more) == 2
    assert not (folder / "result.json").exists()
    return capsys.readouterr().err.strip()


def write_table(path, rows):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(rows)
    path.parent.mkdir(exist_ok=True)
    path.write_text(stream.getvalue())
    return path


def geneval_rows():
    """Prompt i has i % 5 right images of four; the results are in no order."""
    return [
        {
            **{"filename": f"/moved/images/{i:05d}/samples/{k:04d}.png", "correct": k < i % 5},
            **{"tag": official.TAGS[i % 6], "prompt": f"cat {i}", "reason": ""},
        }
        for k in range(4)
        for i in reversed(range(553))
    ]


def test_geneval_is_the_mean_of_six_tasks_over_images(exports, tmp_path, capsys):
    file = official.lines(tmp_path / "results.jsonl", geneval_rows())
    result = scores("geneval", exports, tmp_path, file)
    rates = []
    for t, tag in enumerate(official.TAGS):
        own = [i % 5 / 4 for i in range(553) if i % 6 == t]
        rates.append(sum(own) / len(own))
        assert result[tag] == pytest.approx(rates[-1], abs=1e-6)
    assert result["overall"] == pytest.approx(sum(rates) / 6, abs=1e-6)
    # The record says where the scores come from.
    written = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    kept = {"benchmark": "geneval", "checkpoint": "painter", "settings": {"top_k": 9}, "seed": 42}
    kept |= {"judge": "Mask2Former Swin-S and CLIP ViT-L/14", "judge_version": "v1"}
    kept |= {"prompt_variant": "rewritten", "prompts_sha256": "5", "num_images": 4}
    assert kept.items() <= written.items()
    assert list(written["results"]) == ["results.jsonl"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows.pop(), "1 of 2212 are missing, such as ['00000/samples/0003.png']"),
        (lambda rows: rows.append(rows[0]), "'00552/samples/0000.png' comes twice"),
        (lambda rows: rows[0].update(correct=None), "has no field `correct`"),
        (lambda rows: rows[0].update(tag="counting"), "00552/samples/0000.png is damaged"),
        (lambda rows: rows[0].update(filename="x/0000/samples/9.png"), "are missing"),
    ],
)
def test_incomplete_results_of_geneval_are_refused(change, sentence, exports, tmp_path, capsys):
    rows = geneval_rows()
    change(rows)
    file = official.lines(tmp_path / "results.jsonl", rows)
    assert sentence in refused("geneval", exports, tmp_path, file, capsys)


def test_geneval2_is_the_mean_of_means(exports, tmp_path, capsys):
    lists = [[0.5, 0.25, 1.0][: 1 + i % 3] for i in range(800)]
    lists[0] = [0.0]
    file = tmp_path / "score_lists.json"
    file.write_text(json.dumps(lists))
    result = scores("geneval2", exports, tmp_path, file)
    arithmetic = [sum(values) / len(values) for values in lists]
    geometric = [math.prod(values) ** (1 / len(values)) for values in lists]
    assert result["soft_tifa_am"] == pytest.approx(sum(arithmetic) / 8, abs=1e-6)
    assert result["soft_tifa_gm"] == pytest.approx(sum(geometric) / 8, abs=1e-6)
    (tmp_path / "result.json").unlink()
    for wrong, sentence in (
        (lists[1:], "has 799 lists of scores"),
        ([*lists[:-1], [0.5] * 3], "prompt 0799 has 3 scores, the benchmark has 2"),
        ([[2.0], *lists[1:]], "2.0 is not a score from 0 to 1"),
    ):
        file.write_text(json.dumps(wrong))
        assert sentence in refused("geneval2", exports, tmp_path, file, capsys)


def dpg_text(number=1065, says=None):
    points = [[1.0, 0.5, i % 2, 0.0] for i in range(number)]
    means = [sum(row) / 4 for row in points]
    text = "".join(
        f"/a, b/images/p{i}.png, {', '.join(map(str, row))}, {mean}\n"
        for i, (row, mean) in enumerate(zip(points, means, strict=True))
    )
    overall = 100 * sum(means) / number
    text += "Model: images\nL1 category scores:\n\tentity: 80.5\n\trelation: 70.25\n"
    text += "L2 category scores:\n\tentity - whole: 81.0\nImage path: /a, b/images\n"
    return f"{text}DPG-Bench score: {overall if says is None else says}\n", overall


def test_dpg_is_the_mean_of_its_lines_and_what_the_scorer_says(exports, tmp_path, capsys):
    file = tmp_path / "dpg-bench_results.txt"
    text, overall = dpg_text()
    file.write_text(text)
    expected = {"overall": round(overall, 6), "entity": 80.5, "relation": 70.25}
    assert scores("dpg", exports, tmp_path, file) == expected
    (tmp_path / "result.json").unlink()
    for wrong, sentence in (
        (dpg_text(1064)[0], "1 of 1065 are missing, such as ['p1064']"),
        (dpg_text(says=61.0)[0], "the summary says 61.0"),
        (text.rsplit("\n", 2)[0], "has 0 summaries"),
        (text.replace(", 0, 0.0,", ",", 1), "not made with four images"),
    ):
        file.write_text(wrong)
        assert sentence in refused("dpg", exports, tmp_path, file, capsys)


def test_both_releases_of_wise_are_weighted_sums(exports, tmp_path, capsys):
    def write(rows):
        parts = rows[:400], rows[400:640], rows[640:]
        names = [tmp_path / f"{k}_scores_results.jsonl" for k in range(3)]
        return [official.lines(name, part) for name, part in zip(names, parts, strict=True)]

    def share(first, last):
        own = range(first, last + 1)
        return sum(i % 3 == 0 for i in own) / len(own)

    rows = [{"prompt_id": i, "score": int(i % 3 == 0)} for i in range(1, 1001)]
    result = scores("wise", exports, tmp_path, write(rows), "--judge", "Qwen3.5-35B-A3B")
    groups = (401, 520), (521, 640), (641, 760), (761, 880), (881, 1000)
    overall = 0.4 * share(1, 400) + sum(0.12 * share(*group) for group in groups)
    assert result["overall"] == pytest.approx(overall, abs=1e-6)
    assert result["time"] == pytest.approx(share(401, 520), abs=1e-6)
    (tmp_path / "result.json").unlink()
    # The judge decides the scores, so it is named.
    assert "--judge NAME" in refused("wise", exports, tmp_path, write(rows), capsys)
    more = "--judge", "x"
    sentence = refused("wise", exports, tmp_path, write(rows)[:2], capsys, *more)
    assert "360 of 1000 are missing" in sentence
    # The first release: three marks from 0 to 2, and other groups.
    marks = [
        {**{"prompt_id": i, "consistency": 2 * (i % 3 == 0), "realism": 1}, "aesthetic_quality": 2}
        for i in range(1, 1001)
    ]
    result = scores("wise-legacy", exports, tmp_path, write(marks), *more)
    assert result["time"] == pytest.approx(0.7 * share(401, 567) + 0.1 + 0.1, abs=1e-6)
    groups = {(401, 567): 0.167, (568, 700): 0.133, (701, 800): 0.1, (801, 900): 0.1}
    groups |= {(1, 400): 0.4, (901, 1000): 0.1}
    overall = sum(weight * (0.7 * share(*group) + 0.2) for group, weight in groups.items())
    assert result["overall"] == pytest.approx(overall, abs=1e-6)


def test_oneig_reads_five_tables_of_which_none_left_a_prompt_out(exports, tmp_path, capsys):
    folder, keys = tmp_path / "results", [item.key for item in exports["oneig"].items]
    tables = {
        "alignment": (["alignment"], [0.75], keys[:695]),
        "text": (["ED", "text score"], [31.5, 0.5], [f"{i:03d}" for i in range(200)]),
        "diversity": (["anime", "total average"], [0.25, 0.125], keys),
        "style": (["style"], [0.375], []),
        "reasoning": (["reasoning"], [0.0625], []),
    }
    for metric, (columns, values, names) in tables.items():
        rows = [["", *columns], ["other", *[0] * len(values)], ["mine", *values]]
        write_table(folder / f"{metric}_score_EN_2026.csv", rows)
        rows = [["", "mine"], *([name, 0.5] for name in names)]
        write_table(folder / f"{metric}_prompt_score_EN_2026.csv", rows)
    assert scores("oneig", exports, tmp_path, folder) == {
        **{"alignment_alignment": 0.75, "text_ED": 31.5, "text_text_score": 0.5},
        **{"diversity_anime": 0.25, "diversity_total_average": 0.125, "style_style": 0.375},
        "reasoning_reasoning": 0.0625,
    }
    (tmp_path / "result.json").unlink()
    prompts = folder / "alignment_prompt_score_EN_2026.csv"
    whole = prompts.read_text()
    prompts.write_text(whole.replace("anime_003,0.5", "anime_003,"))
    missing = "1 of 695 are missing, such as ['anime_003']"
    assert missing in refused("oneig", exports, tmp_path, folder, capsys)
    prompts.write_text(whole.replace("anime_003,0.5\n", ""))
    assert missing in refused("oneig", exports, tmp_path, folder, capsys)
    prompts.write_text(whole)
    (folder / "style_score_EN_2026.csv").unlink()
    assert "has 0 files style_score" in refused("oneig", exports, tmp_path, folder, capsys)


def test_longtext_is_the_share_of_all_words(exports, tmp_path, capsys):
    rows = [
        {"image": f"/x/{i:04d}_{k}.png", "match_word_count": k, "gt_word_count": 4 + i}
        for i in official.IDS
        for k in range(1, 5)
    ]
    file = official.lines(tmp_path / "results.jsonl", rows)
    expected = 160 * 10 / sum(4 * (4 + i) for i in official.IDS)
    result = scores("longtext", exports, tmp_path, file)
    assert result == {"text_score": round(expected, 6)}
    (tmp_path / "result.json").unlink()
    official.lines(file, rows[1:])
    assert "1 of 640 are missing" in refused("longtext", exports, tmp_path, file, capsys)
    official.lines(file, [{**rows[0], "match_word_count": 9}, *rows[1:]])
    assert "9 is not a score from 0 to 4" in refused("longtext", exports, tmp_path, file, capsys)


def test_tiif_has_a_short_and_a_long_score_of_each_section(exports, tmp_path, capsys):
    overall = "==== Overall average score of 9 sub-attributes ====\n"
    text = f"==== Basic ====\n       short  long\nmine  0.75  0.5\n\n{overall}mine   0.25  0.125\n"
    file = tmp_path / "result_summary_dimension.txt"
    file.write_text(text)
    result = scores("tiif-mini", exports, tmp_path, file, "--judge", "gpt-4o")
    name = "Overall average score of 9 sub-attributes"
    pairs = {f"{name} short": 0.25, f"{name} long": 0.125}
    assert result == {"Basic short": 0.75, "Basic long": 0.5} | pairs
    (tmp_path / "result.json").unlink()
    for wrong, sentence in (
        (text.partition(overall)[0], "has no `Overall average"),
        (text.replace("0.5\n", "NaN\n"), "'NaN' is not a score"),
    ):
        file.write_text(wrong)
        more = capsys, "--judge", "gpt-4o"
        assert sentence in refused("tiif-mini", exports, tmp_path, file, *more)


def test_imgedit_is_a_mean_by_type(exports, tmp_path, capsys):
    given = {key: 1 + k % 9 / 2 for k, key in enumerate(str(2 * i + 7) for i in range(737))}
    file = tmp_path / "average_score.json"
    file.write_text(json.dumps(given))
    result = scores("imgedit", exports, tmp_path, file, "--judge", "gpt-4.1")
    points, means = list(given.values()), {}
    for kind, count in official.KINDS.items():
        means[kind] = sum(points[:count]) / count
        points = points[count:]
    assert result == {
        "overall": pytest.approx(sum(means.values()) / 9, abs=1e-6),
        **{kind: pytest.approx(mean, abs=1e-6) for kind, mean in means.items()},
    }
    (tmp_path / "result.json").unlink()
    file.write_text(json.dumps({key: value for key, value in given.items() if key != "7"}))
    sentence = refused("imgedit", exports, tmp_path, file, capsys, "--judge", "x")
    assert "1 of 737 are missing, such as ['7']" in sentence


def test_gedit_reports_languages_and_sets_apart(exports, tmp_path, capsys):
    head = ["edited_image", "sementics_score", "quality_score", "instruction_language"]
    edits = [(language, i) for language in ("en", "cn") for i in range(606)]

    def place(language, i):
        return f"/s/mine/fullset/task-{i % 11}/{language}/{i:04x}.png"

    def marks(language, i):
        return (i % 10, 4) if language == "en" else (9, i % 5)

    folder = tmp_path / "scores"
    for task in range(11):
        own = [[place(*x), *marks(*x), x[0]] for x in edits if x[1] % 11 == task]
        write_table(folder / f"mine_task-{task}_gpt_score.csv", [head, *own])
    # The scorer puts all of them together beside the tables of the tasks.
    write_table(folder / "mine_combined_gpt_score.csv", [head, *([place(*x), 0, 0] for x in edits)])
    result = scores("gedit", exports, tmp_path, folder, "--judge", "GPT-4.1")
    assert len(result) == 12
    for language in ("en", "cn"):
        for name, step in (("full", 1), ("intersection", 2)):
            tasks = [
                [
                    math.sqrt(math.prod(marks(language, i)))
                    for i in range(0, 606, step)
                    if i % 11 == t
                ]
                for t in range(11)
            ]
            overall = sum(sum(own) / len(own) for own in tasks) / 11
            assert result[f"{language}_{name}_overall"] == pytest.approx(overall, abs=1e-6)
    assert result["cn_full_semantics"] == 9
    assert result["en_intersection_quality"] == 4
    (tmp_path / "result.json").unlink()
    (folder / "mine_task-3_gpt_score.csv").unlink()
    sentence = refused("gedit", exports, tmp_path, folder, capsys, "--judge", "x")
    assert "110 of 1212 are missing" in sentence


def test_a_record_belongs_to_one_export_and_is_not_overwritten(exports, tmp_path, capsys):
    file = official.lines(tmp_path / "results.jsonl", geneval_rows())
    sentence = refused("geneval", exports, tmp_path, tmp_path / "none.jsonl", capsys)
    assert "none.jsonl does not exist" in sentence
    assert record("geneval", exports["geneval"], tmp_path, file) == 0
    assert record("geneval", exports["geneval"], tmp_path, file) == 2
    assert "add --overwrite" in capsys.readouterr().err
    argv = ["--export", str(tmp_path), "--results", str(file), "--judge-version", "1"]
    assert main(["evaluate", "dpg", "import", *argv]) == 2
    assert "is an export for geneval, not dpg" in capsys.readouterr().err
    (tmp_path / "export.json").write_text('{"benchmark": "dpg"}')
    assert main(["evaluate", "dpg", "import", *argv]) == 2
    assert "was not written by `evaluate NAME export`" in capsys.readouterr().err
