"""YAML without YAML 1.1's traps, with lines; whatever is in the file ends in one message."""

from pathlib import Path

import pytest
from smskd_bench.config import check_matrix
from smskd_export.yaml_reader import parse_yaml, read_yaml, show_path

from smskd.errors import ConfigError, SmskdError

FILE = Path("some.yaml")


def value(text):
    return parse_yaml(f"a: {text}\n", FILE).content["a"]


def refusal(text):
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, FILE)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- scalars


@pytest.mark.parametrize("text", ["no", "yes", "on", "off", "No", "YES", "y", "n", "On"])
def test_words_are_text_not_booleans(text):
    assert value(text) == text


@pytest.mark.parametrize(
    ("text", "meant"), [("true", True), ("True", True), ("false", False), ("FALSE", False)]
)
def test_booleans(text, meant):
    assert value(text) is meant


@pytest.mark.parametrize(
    ("text", "meant"),
    [("1e-3", 1e-3), ("5E-4", 5e-4), ("1e3", 1e3), ("-2e+2", -200.0), ("+.5", 0.5), (".5", 0.5), ("1.", 1.0),
     ("3.14", 3.14), ("1.5e3", 1500.0), ("0.0", 0.0), (".inf", float("inf")), ("-.inf", float("-inf"))],
)  # fmt: skip
def test_floats(text, meant):
    assert value(text) == meant
    assert isinstance(value(text), float)


def test_nan():
    assert value(".nan") != value(".nan")


@pytest.mark.parametrize(("text", "meant"), [("0", 0), ("12", 12), ("-3", -3), ("+7", 7)])
def test_integers(text, meant):
    assert value(text) == meant
    assert isinstance(value(text), int)


@pytest.mark.parametrize(
    "text",
    [
        "012",
        "1:30",
        "0x1F",
        "0o17",
        "0b11",
        "1_000",
        "2024-01-31",
        "2024-01-31 10:00:00",
        "1e",
        "e3",
        ".",
        "1.2.3",
    ],
)
def test_other_numbers_and_dates_stay_text(text):
    assert value(text) == text


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_null(text):
    assert value(text) is None


@pytest.mark.parametrize("text", ['"1e-3"', "'true'", '"null"', '"12"'])
def test_quoted_is_always_text(text):
    assert value(text) == text[1:-1]


@pytest.mark.parametrize("text", ["=", "a=b", "<"])
def test_signs_are_text(text):
    assert value(text) == text


# -------------------------------------------------------------------------------------- structure


def test_lines_of_paths():
    text = "# first\na: 1\nb:\n  - x\n  -\n    c: {d: 2}\n'1': 3\n"
    document = parse_yaml(text, FILE)
    assert document.lines == {
        (): 1, ("a",): 2, ("b",): 3, ("b", 0): 4, ("b", 1): 6, ("b", 1, "c"): 6,
        ("b", 1, "c", "d"): 6, ("1",): 7,
    }  # fmt: skip


def test_where_falls_back_to_the_nearest_parent():
    document = parse_yaml("a: 1\nb:\n  c: 2\n", FILE)
    assert document.where(("b", "c")) == "some.yaml:3: b.c"
    assert document.where(("b", "x", 3, "y")) == "some.yaml:2: b.x[3].y"
    assert document.where(("zzz",)) == "some.yaml:1: zzz"
    assert document.where(()) == "some.yaml:1: the document"


def test_show_path():
    assert show_path(("rows", 3, "name")) == "rows[3].name"
    assert show_path((0, "a")) == "[0].a"


def test_aliases():
    document = parse_yaml("a: &x {b: 1}\nc: *x\nd: [*x, *x]\n", FILE)
    assert document.content == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}
    assert document.where(("a", "b")) == "some.yaml:1: a.b"
    assert document.where(("c", "b")) == "some.yaml:2: c.b"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "\n\n"])
def test_an_empty_file_has_no_content(text):
    document = parse_yaml(text, FILE)
    assert document.content is None
    assert document.lines == {(): 1}


def test_a_byte_order_mark_is_no_matter():
    assert parse_yaml("\ufeffa: 1\n", FILE).content == {"a": 1}


def test_windows_line_ends():
    document = parse_yaml("a: 1\r\nb: 2\r\n", FILE)
    assert document.content == {"a": 1, "b": 2}
    assert document.lines[("b",)] == 2


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "'a' is given twice"),
        ("a:\n  b: 1\n  c: 2\n  b: 3\n", 4, "'b' is given twice"),
        ("a: {b: 1, b: 1}\n", 1, "'b' is given twice"),
        ("- 1\n- {x: 1,\n   x: 2}\n", 3, "'x' is given twice"),
        ("a: &x {k: 1, k: 2}\nb: *x\n", 1, "'k' is given twice"),
        ("1: a\n2: b\n1: c\n", 3, "1 is given twice"),
        ("a: 1\n\tb: 2\n", 2, "\\t"),
        ("a:\n\t- 1\n", 2, "\\t"),
        ("a: [1, 2\nb: 3\n", 2, "expected"),
        ("a: 'x\n", 2, "end of stream"),
        ("a: *nowhere\n", 1, "undefined alias 'nowhere'"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "tag"),
        ("a: !mine 3\n", 1, "tag"),
        ("? [a]\n: 1\n", 1, "key"),
        ("? {a: 1}\n: 1\n", 1, "key"),
        ("a: 1\n!!binary aGk=: 1\n", 2, "key"),
        ("a: 1\n!!timestamp 2020-01-01: 1\n", 2, "key"),
        ("a: &x {k: 1}\nb:\n  <<: *x\n  c: 2\n", 3, "<<"),
        ("a: 'b' c\n", 1, "expected"),
    ],
)  # fmt: skip
def test_bad_yaml_names_the_line(text, line, reason):
    message = refusal(text)
    assert message.startswith(f"some.yaml:{line}: not valid YAML: ")
    assert reason in message


def test_control_characters_are_refused():
    assert "not valid YAML" in refusal("a: b\x07\n")


def test_an_integer_of_thousands_of_digits_is_refused():
    assert refusal(f"a: {'9' * 5000}\n").startswith("some.yaml")


def test_a_missing_file_lists_its_neighbours(tmp_path):
    for name in ("b.yaml", "a.yaml", "c.txt"):
        (tmp_path / name).write_text("x: 1")
    with pytest.raises(ConfigError) as caught:
        read_yaml(tmp_path / "q.yaml")
    assert caught.value.message == f"{tmp_path / 'q.yaml'}: no such file"
    assert caught.value.hint == f"files there: {tmp_path / 'a.yaml'}, {tmp_path / 'b.yaml'}"


def test_a_missing_file_in_an_empty_or_missing_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="no YAML file in"):
            read_yaml(folder / "q.yaml")


def test_what_is_no_text_file(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: caf\xe9\n")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    for file in (latin, binary, tmp_path, latin / "below", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError) as caught:
            read_yaml(file)
        assert str(file) in str(caught.value)


def test_nul_bytes(tmp_path):
    file = tmp_path / "nul.yaml"
    file.write_bytes(b"name: a\0b\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(file)


# ---------------------------------------------------------------------------------- hostile files

HEAD = "name: a\n"


def list_bomb(levels, width=10):
    first = f"x0: &x0 [{', '.join('a' * width)}]\n"
    more = (f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * width)}]\n" for i in range(1, levels))
    return first + "".join(more)


def mapping_bomb(levels):
    more = (f"x{i}: &x{i} {{a: *x{i - 1}, b: *x{i - 1}}}\n" for i in range(1, levels))
    return "x0: &x0 {a: b}\n" + "".join(more)


HOSTILE = {
    "lists in lists": f"{HEAD}d: {'[' * 150}{']' * 150}\n",
    "a little too deep": f"{HEAD}d: {'[' * 480}{']' * 480}\n",
    "as deep as it composes": f"{HEAD}d: {'[' * 490}{']' * 490}\n",
    "far too deep": f"{HEAD}d: {'[' * 5000}\n",
    "mappings in mappings": f"{HEAD}d: {'{a: ' * 450}1{'}' * 450}\n",
    "block sequences": f"{HEAD}d: {'- ' * 400}1\n",
    "a chain of aliases": HEAD + "x0: &x0 [1]\n" + "".join(f"x{i}: &x{i} [*x{i - 1}]\n" for i in range(1, 800)),
    "a bomb of lists": HEAD + list_bomb(9),
    "a bomb of mappings": HEAD + mapping_bomb(60),
    "a bomb in settings": HEAD + "methods:\n" + "".join(f"  {line}\n" for line in list_bomb(9).splitlines()),
    "a bomb in keys": HEAD + list_bomb(9) + "? *x8\n: 1\n",
    "itself": f"{HEAD}d: &a [*a]\n",
    "itself in a row": f"{HEAD}rows: &a [*a]\n",
    "itself in a setting": f"{HEAD}methods: {{v: &a {{method: kd, settings: *a}}}}\n",
    "half a character": f'{HEAD}description: "\\ud800"\n',
    "half a key": f'{HEAD}"\\ud800": 1\n',
}  # fmt: skip


@pytest.mark.timeout(60)  # a bomb would take for ever; how fast it is refused is no test
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_documents_end_in_one_short_message(what):
    with pytest.raises(SmskdError) as caught:
        check_matrix(parse_yaml(HOSTILE[what], FILE))
    text = str(caught.value)
    assert len(text) < 4000
    assert "some.yaml" in text
    assert "RecursionError" not in text
    text.encode()  # can be printed


def test_a_file_without_end(tmp_path):
    with pytest.raises(ConfigError, match="more than 4 MiB"):
        read_yaml(Path("/dev/zero"))
    (tmp_path / "large.yaml").write_bytes(b"# " + bytes([120]) * (4 << 20))
    with pytest.raises(ConfigError, match="more than 4 MiB"):
        read_yaml(tmp_path / "large.yaml")


@pytest.mark.parametrize("number", [2**63 + 1, -(2**64), 10**30])
def test_integers_beyond_64_bits(number):
    assert "an integer beyond 64 bits" in refusal(f"a: {number}\n")
    assert value(str(2**63)) == 2**63


@pytest.mark.timeout(120)  # it took minutes; how long it takes now is no test
def test_very_many_seeds_are_refused_soon():
    seeds = ", ".join(str(i // 2) for i in range(40_000))
    with pytest.raises(ConfigError, match="0 is there twice"):
        check_matrix(parse_yaml(f"name: a\nseeds: [{seeds}]\n", FILE))
