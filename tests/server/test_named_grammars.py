"""Grammars by name: what people write is taken, what the language's own parser refuses never comes."""

import ast
import json
import random
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import text_samples
from llguidance import LLMatcher

from ropeway.scheduler.grammar import Grammars
from ropeway.scheduler.shortest_end import FREE
from ropeway.server.named_grammars import NAMED_GRAMMARS, named_grammar
from ropeway.server.tokenizer import TextTokenizer

TOKENIZER = TextTokenizer(text_samples.byte_level())
GRAMMARS = Grammars(TOKENIZER.backend.to_str, TOKENIZER.backend.get_vocab_size())
LANGUAGES = [name for name in NAMED_GRAMMARS if name != "json"]

PYTHON = '''\
"""Reads numbers."""
import os.path as p, sys
from . import a, b as c
from typing import (Any,
    Optional)

@cache
@app.route("/x", methods=["GET"])
async def f(a, b: int = 3, *rest: str, key=None, **more) -> dict[str, Any]:
    """Doc with "quotes"."""
    x, (y) = a, b  # swap
    total += x ** -2 // 3 if x is not None else ~y
    # a remark
    for i, item in enumerate(rest):
        if not item or item in ("a", 'b') and i < 3:
            continue
        elif item == f"{i}: {item.name!r} {x:.2f}":
            break
        else:
            try:
                await g(*rest, key=[n * 2 for n in rest if n], **{"k": {1, 2}})
            except (ValueError, KeyError) as error:
                raise RuntimeError("no") from error
            finally:
                del x[1:-1], y.z

    with open("f") as file, lock: pass
    return {k: v[::2] for k, v in more.items()}


class Point(Base, metaclass=Meta):
    x: int = 0
    def __init__(self):
        self.f = lambda a, b: a @ b
        assert self.x, "none"
        yield 1
while True: x = 0x1F + 1.5e-3
'''
C = """\
#include <stdio.h>
#define LIMIT 10
/* A node. */
typedef struct node { int value; struct node *next; } node_t;
enum color { RED, GREEN = 2 };
static int table[LIMIT] = {1, 2, [4] = 3};
int sum(const int *values, size_t count);
unsigned long long fold(node_t *head, char **names) {
    int total = 0, i;
    // all of them
    for (int i = 0; i < 10; i++) total += values[i] * -1;
    while (head != NULL && !head->next) { head = head->next; }
    do { total--; } while (total > 0x1F);
    if (total % 2 == 0) return (double)total / 2.5; else if (total) total <<= 1; else { *names = "a\\n"; }
    switch (total) { case 1: total = 'x'; break; default: printf("%d %s\\n", total, names[0]); }
    return sizeof(int) + (total ? ~total : a - -b);
}
"""
JAVA = """\
package a.b;
import java.util.*;
import static java.lang.Math.max;
// A shop.
public class Shop<T> extends Base implements Runnable, Comparable<Shop<T>> {
    private static final int LIMIT = 10;
    protected Map<String, List<int[]>> items = new HashMap<>();
    public Shop(final int limit) throws IOException { super(limit); this.limit = limit; }
    @Override public void run() {
        int[] values = {1, 2, 3};
        for (int i = 0; i < values.length; i++) { total += values[i] * 2; }
        for (String name : names) if (name == null || !name.isEmpty() && i >= 3) continue; else break;
        try { call(x -> x + 1, (a, b) -> { return a; }); } catch (A | B error) { throw new C("no" + 1.5f); } finally { }
        while (true) { var x = (int) y; list.get(0).name = x > 3 ? "a" : 'b' + ""; }
        switch (x) { case 1: return; default: x--; }
    }
    <K> K first(List<? extends K> list, K... more) { return o instanceof String ? (K) o : new int[3][0]; }
    enum Color { RED, GREEN }
}
interface Shape { double area(); }
"""
GO = """\
package main

import (
	"fmt"
	str "strings"
)

// Point is one.
type Point struct {
	X, Y int
	Next *Point
}

type Shape interface {
	Area() float64
}

const limit = 10

var names = []string{"a", "b"}

func (p *Point) Add(a, b int, more ...string) (int, error) {
	x, err := strconv.Atoi("1")
	if err != nil {
		return 0, fmt.Errorf("no: %w", err)
	} else if x := f(); x > 3 && !ok {
		x++
	}
	for i := 0; i < 10; i++ {
		total += values[i] * -1
	}
	for key, value := range table {
		go work(key, value...)
		defer func() { done() }()
	}
	switch x {
	case 1, 2:
		break
	default:
		p.X = names[1:2].(int) << 2
	}
	m := map[string]int{"a": 1, "b": 2}
	return x, &Point{X: 1, Y: 2}
}
"""
SQL = """\
SELECT DISTINCT t.a, COUNT(*) AS n FROM t LEFT JOIN u ON t.id = u.id WHERE t.a > 1.5 AND NOT (b IS NULL) GROUP BY t.a \
HAVING n >= 2 ORDER BY n DESC LIMIT 10 OFFSET 5 UNION ALL SELECT 'it''s' FROM (SELECT * FROM v) WHERE a IN (1, 2);"""
PROGRAMS = {"python": PYTHON, "c": C, "java": JAVA, "go": GO, "sql": SQL}
SQL_PARTS = SQL.replace(" ORDER BY n DESC LIMIT 10 OFFSET 5 UNION ALL", " UNION ALL")
WRONG = {
    "python": [
        "if x:\npass\n",
        "x = \n",
        "1 = x\n",
        "def f(:\n    pass\n",
        "for = 3\n",
        "f(a=1, b)\n",
        "x = 'a\n",
        "  x\n",
    ],
    "c": ["int main( {}", "int f() { return 1 }", "int f() { x = ; }", "for(;;);", "int int;", "int f() { if x; }"],
    "java": [
        "class { }",
        "class A { int f() { 1 + 2; } }",
        "class A { if (x) {} }",
        "class A { void f() { try { } } }",
    ],
    "go": [
        "package main\nfunc f() {",
        "package main\nx := 1\n",
        "package main\nfunc f() { if { } }\n",
        "func f() {}\n",
    ],
    "sql": ["SELECT FROM t", "SELECT a b c FROM t", "SELECT a FROM t WHERE", "DROP TABLE t", "SELECT (a FROM t"],
}


def matcher(name: str) -> LLMatcher:
    """Over bytes."""
    text = named_grammar(name)
    whole = [{"name": "whole", "lark_grammar": "start: @answer"}, {"name": "answer", "lark_grammar": text}]
    return GRAMMARS.compile(json.dumps({"grammars": whole}), letters=True).result().deep_copy()


def takes(name: str, text: str) -> bool:
    """Whether it is a text of the grammar."""
    at = matcher(name)
    letters = GRAMMARS.alphabet.letters(text.encode())
    return at.try_consume_tokens(letters) == len(letters) and bool(at.is_accepting())


@pytest.mark.parametrize("name", LANGUAGES)
def test_what_people_write(name: str) -> None:
    """Guards coverage: a program with most of what the language has."""
    program = SQL_PARTS if name == "sql" else PROGRAMS[name]
    at = matcher(name)
    letters = GRAMMARS.alphabet.letters(program.encode())
    taken = at.try_consume_tokens(letters)
    assert taken == len(letters), f"stops behind {program.encode()[:taken][-60:]!r}"
    assert at.is_accepting()


@pytest.mark.parametrize("name", LANGUAGES)
def test_what_is_wrong(name: str) -> None:
    """Guards the grammar against taking anything."""
    assert [text for text in WRONG[name] if takes(name, text)] == []


CLOSING = [b"\n", b";", b")", b"]", b"}", b'"', b"'", b"`", b"x", b"1", b" ", b"*/", b":", b"    ", b"{", b"("]


def grown(name: str, rng: random.Random, pieces: list[bytes]) -> str | None:
    """The beginning of a program, gone on with at random and then ended, if that succeeds."""
    at, alphabet = matcher(name), GRAMMARS.alphabet
    text = PROGRAMS[name].encode()
    text = text[: rng.randrange(len(text))]
    text = text[: at.try_consume_tokens(alphabet.letters(text))]

    def add(piece: bytes) -> bool:
        nonlocal text
        fits = at.validate_tokens(alphabet.letters(piece)) == len(piece)
        if fits:
            at.consume_tokens(alphabet.letters(piece))
            text += piece
        return bool(fits)

    for _ in range(rng.randrange(60)):
        following = [byte for byte in alphabet.allowed(at)[1] if byte < 128]
        if len(following) > FREE and rng.random() < 0.7:
            any(add(piece) for piece in CLOSING[:8])
        elif rng.random() < 0.8:
            add(rng.choice(pieces))
        elif following:
            add(bytes([rng.choice(following)]))
    for turn in range(150):
        if at.is_accepting():
            return text.decode()
        tried = CLOSING if turn < 40 else rng.sample(CLOSING, len(CLOSING))
        any(add(piece) for piece in (*tried, *rng.sample(pieces, len(pieces))))
    return None


def python_refuses(texts: list[str], folder: Path) -> list[str]:
    def refused(text: str) -> bool:
        try:
            ast.parse(text)
        except SyntaxError:
            return True
        return False

    return list(filter(refused, texts))


def sqlite_refuses(texts: list[str], folder: Path) -> list[str]:
    database = sqlite3.connect(":memory:")

    def refused(text: str) -> bool:
        try:
            database.execute("EXPLAIN " + text)
        except sqlite3.Error as error:
            return "syntax error" in str(error) or "unrecognized token" in str(error)
        return False

    found = list(filter(refused, texts))
    database.close()
    return found


SYNTAX = re.compile(r"error:.*(expected|stray|missing|suffix|unterminated|empty character|a label can)")

GUESSED = "unknown type name"
"""gcc takes `a * b == c;` for a declaration where nobody declared `a`."""


def gcc_refuses(texts: list[str], folder: Path) -> list[str]:
    """Names that nobody declared, types that do not fit, and what macros stand for, are no syntax."""
    found = []
    heads = "typedef struct FILE FILE; typedef _Bool bool; typedef unsigned long size_t;\n"
    for bits, kind in (("8", "char"), ("16", "short"), ("32", "int"), ("64", "long")):
        heads += f"typedef {kind} int{bits}_t; typedef unsigned {kind} uint{bits}_t;\n"
    for place, text in enumerate(texts):
        path = folder / f"{place}.c"
        path.write_text(heads + re.sub("#(include|define) .*", "", text))
        said = subprocess.run(["gcc", "-fsyntax-only", "-w", "-std=gnu11", path], capture_output=True, text=True).stderr
        found += [text + "\n" + said] if SYNTAX.search(said) and GUESSED not in said else []
    return found


PARSE = """
import com.sun.source.util.JavacTask;
import javax.tools.*;
public class Parse {
    public static void main(String[] files) throws Exception {
        var compiler = ToolProvider.getSystemJavaCompiler();
        for (String file : files) {
            var said = new DiagnosticCollector<JavaFileObject>();
            var manager = compiler.getStandardFileManager(said, null, null);
            var units = manager.getJavaFileObjects(file);
            ((JavacTask) compiler.getTask(null, manager, said, java.util.List.of("-proc:none"), null, units)).parse();
            for (var one : said.getDiagnostics())
                if (one.getKind() == Diagnostic.Kind.ERROR)
                    System.out.println(file + " " + one.getMessage(java.util.Locale.ENGLISH).replace("\\n", " "));
        }
    }
}
"""


def javac_refuses(texts: list[str], folder: Path) -> list[str]:
    """That a constructor has its class's name is no matter of a grammar."""
    (folder / "Parse.java").write_text(PARSE)
    paths = [folder / f"T{place}.java" for place in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    command = ["java", "Parse.java", *(path.name for path in paths)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True).stdout
    return [line for line in said.splitlines() if "invalid method declaration" not in line]


def gofmt_refuses(texts: list[str], folder: Path) -> list[str]:
    for place, text in enumerate(texts):
        (folder / f"{place}.go").write_text(text)
    command = ["gofmt", "-l", "-e", *(f"{place}.go" for place in range(len(texts)))]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder).stderr.splitlines()


REFEREES: list[tuple[str, str | None, Callable[[list[str], Path], list[str]]]] = [
    ("python", None, python_refuses),
    ("sql", None, sqlite_refuses),
    ("c", "gcc", gcc_refuses),
    ("java", "javac", javac_refuses),
    ("go", "gofmt", gofmt_refuses),
]


@pytest.mark.parametrize(("name", "program", "refuses"), REFEREES)
def test_referee(
    name: str, program: str | None, refuses: Callable[[list[str], Path], list[str]], tmp_path: Path
) -> None:
    """Guards the promise: whatever is written by the grammar, the language's own parser takes it."""
    if program is not None and shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    rng = random.Random(5)
    words = re.findall(rb"\w+|[^\w\s]+|\s+", PROGRAMS[name].encode())
    pieces = sorted({*words, *CLOSING})
    texts = [text for text in (grown(name, rng, pieces) for _ in range(150)) if text is not None]
    assert len(texts) > 30
    assert refuses(texts, tmp_path) == []
