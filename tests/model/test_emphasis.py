"""Prompt weights: their syntax, the weight of each token, what they do to text features."""

import math
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import small
from zimage_jax.errors import UsageError
from zimage_jax.model import emphasis
from zimage_jax.model.emphasis import Span, escape, parse, quoted
from zimage_jax.model.prompt import Encoded, Prompts

MARKS = st.text(st.sampled_from("ab ()[]:\\.1\n红"), max_size=30)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts(type(small.tokenizer()).from_str(small.tokenizer().to_str()))


# -- syntax ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "plain", "spans"),
    [
        ("a red circle", "a red circle", ()),
        ("a (red:1.3) circle", "a red circle", ((2, 5, 1.3),)),
        ("a (red) circle", "a red circle", ((2, 5, 1.1),)),
        ("a [red] circle", "a red circle", ((2, 5, 1 / 1.1),)),
        ("((a:2) b:0.5)", "a b", ((1, 3, 0.5),)),
        ("(a (b:2):1.5)(c:.5)", "a bc", ((0, 2, 1.5), (2, 3, 3.0), (3, 4, 0.5))),
        ("(a:1.5)(b: 1.5 )", "ab", ((0, 2, 1.5),)),
        ("(:2)() (a:1)[:)", None, None),
        ("(:2)()[](a:1)", "a", ()),
        (r"a \(b\) \[c\] \\ \: \x", r"a (b) [c] \ : \x", ()),
        ('(text: "A7":1.2)', 'text: "A7"', ((0, 10, 1.2),)),
        ("[a: b]", "a: b", ((0, 4, 1 / 1.1),)),
        ("[(a:1.2): b]", "a: b", ((0, 1, 1.2 * (1 / 1.1)), (1, 4, 1 / 1.1))),
        ("12:30", "12:30", ()),
        ("(红色:0)的圆形", "红色的圆形", ((0, 2, 0.0),)),
        ("\\", "\\", ()),
    ],
)
def test_plain_text_and_spans(prompt, plain, spans):
    if plain is None:
        with pytest.raises(UsageError):
            parse(prompt)
        return
    found, of = parse(prompt)
    assert found == plain
    assert [(s.start, s.end, pytest.approx(s.weight, rel=1e-15)) for s in of] == list(spans)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (red circle", "'(' is not closed (character 3)"),
        ("a [red (circle)", "'[' is not closed (character 3)"),
        ("a red) circle", "')' closes nothing (character 6)"),
        ("a (red] circle", "']' closes nothing (character 7)"),
        ("(red:big)", "'big' is not a weight (character 6)"),
        ("(red:)", "'' is not a weight (character 6)"),
        ("(red:nan)", "'nan' is not a weight (character 6)"),
        ("(red:inf)", "'inf' is not a weight (character 6)"),
        ("(red:1e3)", "'1e3' is not a weight (character 6)"),
        ("(red:1_0)", "'1_0' is not a weight (character 6)"),
        ("(red:٣)", "is not a weight (character 6)"),
        ("(a: (b))", "'(b)' is not a weight (character 4)"),
        ("(red:4.01)", "weight '4.01' is not from 0 to 4 (character 6)"),
        ("(red:-1)", "weight '-1' is not from 0 to 4 (character 6)"),
        (f"(red:{'9' * 400})", "is not from 0 to 4 (character 6)"),
        ("((red:3):2)", "the weights multiply to more than 4 (character 2)"),
        ("(" * 20000 + "a:0" + ")" * 20000, "the weights multiply to more than 4"),
    ],
)
def test_a_mistake_is_one_line_that_says_where(prompt, message):
    with pytest.raises(UsageError) as fault:
        parse(prompt)
    assert message in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.exhaustive
@pytest.mark.parametrize("bracket", "([)]")
def test_many_brackets_take_neither_the_stack_nor_long(bracket):
    began = time.process_time()
    with pytest.raises(UsageError):
        parse(bracket * (64 << 10))
    plain, ((start, end, weight),) = parse("[" * (32 << 10) + "a" + "]" * (32 << 10))
    assert (plain, start, end) == ("a", 0, 1)
    assert weight < 1e-300
    pairs = parse("(a)" * (21 << 10))
    assert pairs == ("a" * (21 << 10), (Span(0, 21 << 10, 1.1),))
    assert time.process_time() - began < 5


@given(text=MARKS)
def test_an_escaped_text_comes_back_without_weights(text):
    assert parse(escape(text)) == (text, ())


@given(prompt=MARKS)
def test_spans_are_in_order_and_within_the_text(prompt):
    try:
        plain, spans = parse(prompt)
    except UsageError:
        return
    edges = [edge for span in spans for edge in span[:2]]
    assert edges == sorted(edges)
    assert all(0 <= s.start < s.end <= len(plain) for s in spans)
    assert all(0 <= s.weight <= 4 and s.weight != 1 for s in spans)


@given(weights=st.lists(st.floats(0.25, 1.5).map(lambda w: round(w, 3)), min_size=1, max_size=3))
def test_nested_weights_multiply(weights):
    prompt = "(" * len(weights) + "a" + "".join(f":{w})" for w in weights)
    plain, spans = parse("x " + prompt)
    product = math.prod(weights)
    assert plain == "x a"
    assert emphasis.by_character(plain, spans)[2] == pytest.approx(product)
    assert len(spans) == (product != 1)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('text: "A7" in red', ["A7"]),
        ('写着：“大小”和「山」『水"火』', ["大小", "山", '水"火']),
        ('"A" and "B"', ["A", "B"]),
        ("don't quote the dogs' bowl", []),
        ('an inch is 1" long', []),
        ('“never ends, "but this" does', ["but this"]),
        ('"" empty', []),
    ],
)
def test_text_in_quotes(text, found):
    assert [text[a:b] for a, b in quoted(text)] == found


@pytest.mark.parametrize("quote", ['"', "“", "”", "「", "“”"])
def test_many_quotes_do_not_take_long(quote):
    began = time.process_time()
    assert len(quoted(quote * (64 << 10))) == 0
    quoted('"“' * (32 << 10))
    assert time.process_time() - began < 2


# -- tokens ----------------------------------------------------------------------------------------


def tokens(prompts: Prompts, e: Encoded) -> dict[str, float]:
    """Text of each token -> its weight."""
    return {
        prompts._tokenizer.decode([i], skip_special_tokens=False): w
        for i, w in zip(e.ids, e.weights, strict=True)
    }


def test_a_token_has_the_weight_of_its_characters_but_spaces(prompts):
    e = emphasis.encode(prompts, "a (red:1.3) circle [blue]", has_weights=True)
    found = tokens(prompts, e)
    assert found[" red"] == 1.3
    assert found[" blue"] == 1 / 1.1
    assert found[" circle"] == found["<|im_start|>"] == found["<|im_end|>"] == 1
    half = tokens(prompts, emphasis.encode(prompts, "a ci(rcle:2)", has_weights=True))
    assert half[" circle"] == pytest.approx((2 * 1 + 4 * 2) / 6)


@given(text=st.text(max_size=40), weight=st.floats(0, 4))
def test_weights_change_no_token(prompts, text, weight):
    weights = np.full(len(text), weight)
    e = prompts.encode(text, weights=weights)
    assert (e.ids, e.cut) == (prompts.encode(text).ids, prompts.encode(text).cut)
    if weight == 1 or not text:
        assert e == prompts.encode(text)
    else:
        tail = len(prompts._tail)
        assert len(e.weights) == len(e.ids)
        assert e.weights[0] == 1
        assert set(e.weights[-tail:]) == {1.0}
        assert all(min(1, weight) <= w <= max(1, weight) for w in e.weights)


def test_a_prompt_that_is_cut_keeps_the_weights_of_what_is_left(prompts):
    text = "(" + "a b " * 2000 + ":1.5)"
    e = emphasis.encode(prompts, text, has_weights=True)
    assert len(e.weights) == len(e.ids) == 512
    assert e.cut


def test_brackets_are_text_unless_weights_are_asked_for(prompts):
    text = 'a (red:1.3) "A7'
    assert emphasis.encode(prompts, text) == prompts.encode(text)
    assert emphasis.encode(prompts, text, text_weight=1.5) == prompts.encode(text)
    assert emphasis.encode(prompts, "a \\(b\\)", has_weights=True) == prompts.encode("a (b)")


def test_quoted_text_has_its_weight_times_the_brackets(prompts):
    e = emphasis.encode(prompts, 'a red: "A7"', text_weight=1.5)
    found = tokens(prompts, e)
    assert {found["A"], found["7"]} == {1.5}
    assert found[" red"] == 1
    both = emphasis.encode(prompts, '(a red "A7":2)', has_weights=True, text_weight=1.5)
    assert tokens(prompts, both)["7"] == 3.0
    assert tokens(prompts, both)[" red"] == 2.0


def test_nothing_but_brackets_is_an_empty_prompt():
    with pytest.raises(UsageError, match="the prompt is empty"):
        emphasis.check("()[ ]")
    emphasis.check("(a)")


# -- features --------------------------------------------------------------------------------------


def features(tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, 12), np.float32)


@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.3, 4.0]), min_size=1, max_size=9),
    seed=st.integers(0, 99),
)
def test_weights_move_their_own_tokens_and_those_below_1_later_ones(weights, seed):
    own, neutral = features(len(weights), seed), features(len(weights), seed + 100)
    moved = emphasis.emphasise(own, neutral, weights)
    assert moved.dtype == np.float32
    before: list[float] = []  # weights of weighted tokens so far, at most 1
    for m, f, n, w in zip(moved, own, neutral, weights, strict=True):
        if w != 1:
            before.append(min(w, 1))
        by = w if w != 1 or not before else sum(before) / len(before)
        if by in (0, 1):
            np.testing.assert_array_equal(m, f if by else n)
        else:
            np.testing.assert_allclose(m, n + by * (f - n), rtol=1e-5, atol=1e-5)


def test_weights_above_1_move_no_bit_of_other_tokens():
    own, neutral = features(5), features(5, 1)
    moved = emphasis.emphasise(own, neutral, [1.0, 1.3, 1.0, 4.0, 1.0])
    np.testing.assert_array_equal(moved[[0, 2, 4]], own[[0, 2, 4]])
    assert (moved[[1, 3]] != own[[1, 3]]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_features_keep_their_bits_where_the_weight_is_1(dtype):
    own = features(2).astype(jnp.dtype(dtype))
    moved = emphasis.emphasise(own, own[::-1].copy(), [1.0, 0.5])
    np.testing.assert_array_equal(moved[0].astype(own.dtype), own[0])


def test_the_text_encoder_runs_a_neutral_text_only_for_weights(prompts):
    plain = emphasis.encode(prompts, "a red circle")
    heavy = emphasis.encode(prompts, "a (red:2) circle", has_weights=True)
    assert emphasis.to_run([plain, heavy, plain]) == [
        plain,
        heavy,
        plain,
        Encoded(heavy.neutral, ""),
    ]
    commas = text_of(prompts, heavy.neutral)
    assert commas.startswith("<|im_start|>user\na, circle<|im_end|>")
    given_to = [features(len(e.ids), i) for i, e in enumerate(emphasis.to_run([plain, heavy]))]
    first, second = emphasis.of_texts([plain, heavy], given_to)
    assert first is given_to[0]
    np.testing.assert_array_equal(
        second, emphasis.emphasise(given_to[1], given_to[2], heavy.weights)
    )


def text_of(prompts: Prompts, ids) -> str:
    return prompts._tokenizer.decode(list(ids), skip_special_tokens=False)


@given(seed=st.integers(0, 2**64 - 1), strength=st.floats(0.01, 1))
def test_noise_of_a_seed(seed, strength):
    own = 3 * features(40)
    varied = emphasis.vary(own, strength, seed)
    np.testing.assert_array_equal(varied, emphasis.vary(own, strength, seed))
    change = varied - own
    assert 0.4 < np.mean(change == 0) < 0.6
    largest = strength * own.std()
    assert 0.9 * largest < np.abs(change).max() <= 1.001 * largest
    assert abs(change.mean()) < 0.1 * largest
    assert (emphasis.vary(own, strength, seed ^ 1) != varied).any()


def test_no_variance_is_no_change():
    own = features(3)
    assert emphasis.vary(own, 0.0, 5) is own


def test_the_noise_of_a_seed_never_changes():
    """Pictures are drawn again years later."""
    own = np.array([[1, -1, 1, -1], [1, -1, 1, -1]], np.float32)
    change = [[0.12509537, 0.39721376, 0, 0], [-0.19983375, 0, 0, 0.32122838]]
    np.testing.assert_allclose(emphasis.vary(own, 0.5, 7) - own, change, atol=1e-6)
