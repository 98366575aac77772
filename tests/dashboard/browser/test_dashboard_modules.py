"""The pages' modules, in the browser that runs them: Markdown stays text, patches are what the server means."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from served_demo import Demo
from watching import Open, Watched

from dashboard.snapshot import difference


@pytest.fixture
def page(open_page: Open, demo: Demo) -> Watched:
    watched = open_page(demo)
    watched.page.goto(f"{demo.url}/dashboard")
    return watched


def module(page: Watched, name: str, expression: str, argument: Any = None) -> Any:
    """`expression` with the module as `m` and the argument as `a`."""
    return page.page.evaluate(
        f"async (a) => {{ const m = await import('/dashboard/static/js/{name}'); return {expression}; }}", argument
    )


DRAWN = """(async () => {
  const { render } = await import('/dashboard/static/js/vdom.js');
  const root = document.createElement('div');
  document.body.append(root);
  render(root, m.markdown(a, () => {}));
  const html = root.innerHTML;
  root.remove();
  return html;
})()"""


NAMES = DRAWN.replace(
    "root.innerHTML", "[...root.querySelectorAll('*')].flatMap((each) => [...each.attributes].map((one) => one.name))"
)
"""Of all attributes."""


def drawn(page: Watched, text: str) -> str:
    html: str = module(page, "markdown.js", DRAWN, text)
    return html


HOSTILE = [
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title = 'owned'\">",
    "[click](javascript:document.title='owned')",
    "[click](data:text/html,<script>alert(1)</script>)",
    "[click](JaVaScRiPt:alert(1))",
    "![x](https://evil.example/pixel.png)",
    "```html\n<script>document.title = 'owned'</script>\n```",
    "| <b>x</b> | y |\n|---|---|\n| <img src=x onerror=alert(1)> | z |",
    "<iframe src='https://evil.example'></iframe>",
    "`<svg onload=alert(1)>`",
    "# <a href='javascript:alert(1)'>x</a>",
    "> <style>*{display:none}</style>",
    '<https://evil.example/" onmouseover="alert(1)>',
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_model_writes_never_becomes_html(page: Watched, text: str) -> None:
    html = drawn(page, text)
    for tag in ("<script", "<img", "<iframe", "<svg", "<style", "<b>"):
        assert tag not in html.lower()
    names = module(page, "markdown.js", NAMES, text)
    assert set(names) <= {"class", "href", "rel", "target", "tabindex", "type", "start", "role", "aria-label"}
    links = module(
        page, "markdown.js", DRAWN.replace("root.innerHTML", "[...root.querySelectorAll('a')].map((a) => a.href)"), text
    )
    assert all(link.startswith("https://") for link in links)
    assert page.page.title() != "owned"


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("plain", "<p>plain</p>"),
        (
            "**bold** and *slanted* and `code`",
            "<p><strong>bold</strong> and <em>slanted</em> and <code>code</code></p>",
        ),
        ("a * b * c, snake_case_name", "<p>a * b * c, snake_case_name</p>"),
        ("- one\n- two", "<ul><li>one</li><li>two</li></ul>"),
        ("3. three\n4. four", '<ol start="3"><li>three</li><li>four</li></ol>'),
        ("> quoted", "<blockquote><p>quoted</p></blockquote>"),
        ("---", "<hr>"),
        ("# Title", '<h4 class="heading level-1">Title</h4>'),
        ("a < b & c", "<p>a &lt; b &amp; c</p>"),
        ("~~gone~~", "<p><del>gone</del></p>"),
    ],
)
def test_markdown(page: Watched, text: str, html: str) -> None:
    assert drawn(page, text) == html


def test_links_lead_to_the_web_and_know_nothing_of_this_page(page: Watched) -> None:
    html = drawn(page, "see [the site](https://example.org/a?b=1) or https://example.org.")
    assert html.count('href="https://example.org') == 2
    assert html.count('rel="noopener noreferrer nofollow"') == 2
    assert html.endswith("</a>.</p>"), "a full stop is no part of an address"


def test_code_that_is_not_closed_yet_is_code(page: Watched) -> None:
    html = drawn(page, "so:\n```python\nprint('<b>')\n")
    assert "<pre" in html and "print('&lt;b&gt;')" in html and "python" in html


def values(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 4:
        return [values(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {key: values(rng, depth + 1) for key in rng.sample("abcd", rng.randrange(4))}
    return [None, rng.random() < 0.5, rng.randrange(4), rng.choice(["x", "y"])][kind]


def test_the_page_s_patches_are_the_server_s(page: Watched) -> None:
    rng = random.Random(1)
    states = [{"a": values(rng), "b": values(rng), "c": values(rng)} for _ in range(60)]
    patches = [difference(old, new) for old, new in itertools.pairwise(states)]
    reached = module(
        page, "store.js", "a[1].reduce((all, patch) => [...all, JSON.parse(JSON.stringify(m.patched("
        "JSON.parse(JSON.stringify(all.at(-1))), patch)))], [a[0]])", [states[0], patches],
    )  # fmt: skip
    assert [json.dumps(state, sort_keys=True) for state in reached] == [
        json.dumps(state, sort_keys=True) for state in states
    ]


def test_news_that_miss_something_are_not_taken(page: Watched) -> None:
    snapshot = {"number": 4, "state": {"time": 1.0, "x": 1}, "history": []}
    told = module(
        page, "store.js",
        "[m.hear('patch', {number: 1, patch: []}), m.hear('snapshot', a),"
        " m.hear('patch', {number: 5, patch: [[['x'], 2]]}),"
        " m.store.state.x, m.hear('patch', {number: 7, patch: []})]",
        snapshot,
    )  # fmt: skip
    assert told == [False, True, True, 2, False]


@pytest.mark.parametrize(
    ("layers", "cut", "at", "after"),
    [([2, 4], 0, 3, [3, 3]), ([2, 4], 0, 99, [6, 0]), ([2, 2, 2], 1, 0, [2, 0, 4]), ([2, 2, 2], 0, 4, [4, 0, 2])],
)
def test_cuts_go_no_further_than_their_neighbours(
    page: Watched, layers: list[int], cut: int, at: int, after: list[int]
) -> None:
    assert module(page, "cuts.js", "m.moveCut(...a)", [layers, cut, at]) == after


def test_devices_are_named_as_the_api_takes_them(page: Watched) -> None:
    devices = [
        {"name": "cpu#0", "limit_bytes": 5, "backend": "cpu"}, {"name": "cuda:1", "limit_bytes": 7, "backend": "cuda"},
    ]  # fmt: skip
    assert module(page, "cuts.js", "m.deviceList(a)", devices) == "cpu=5B,cuda:1=7B"
    assert module(page, "cuts.js", "m.deviceList(a)", [{**devices[0], "backend": "sim"}]) is None


def test_only_what_has_changed_is_drawn_again(page: Watched) -> None:
    told = module(
        page, "vdom.js",
        """(() => {
          const root = document.createElement('ul');
          const draw = (keys, note) => m.render(
            root, note ? m.h('p', null, 'note') : null, keys.map((key) => m.h('li', { key }, key)));
          const names = () => [...root.querySelectorAll('li')].map((each) => each.textContent).join('');
          draw(['a', 'b', 'c'], false);
          const b = root.querySelectorAll('li')[1];
          const steps = [];
          const turns = [
            [['c', 'b', 'd'], true], [['b'], false], [['x', 'b', 'y'], true], [[], false], [['b'], true]];
          for (const [keys, note] of turns) {
            draw(keys, note);
            steps.push([names(), root.querySelectorAll('p').length, root.contains(b)]);
          }
          return steps;
        })()""",
    )  # fmt: skip
    assert told == [["cbd", 1, True], ["b", 0, True], ["xby", 1, True], ["", 0, False], ["b", 1, False]]
