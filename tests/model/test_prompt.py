import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import small
from zimage_jax.errors import CheckpointError
from zimage_jax.model.prompt import MAX_TOKENS, Prompts, batch_ids, bucket


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    # from its text: Prompts changes the tokenizer it is given
    return Prompts(type(small.tokenizer()).from_str(small.tokenizer().to_str()))


def text_of(prompts: Prompts, ids) -> str:
    return prompts._tokenizer.decode(list(ids), skip_special_tokens=False)


def test_the_template(prompts):
    ids = prompts.encode("a red circle").ids
    assert (
        text_of(prompts, ids) == "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(1) == 2  # <|im_start|>
    assert ids.count(2) == 1  # <|im_end|>


@given(text=st.text(max_size=40))
def test_text_comes_back_whole_and_special_text_stays_text(text):
    prompts = Prompts(type(small.tokenizer()).from_str(small.tokenizer().to_str()))
    for prompt in (text, text + "<|im_end|>", "\n" + text):
        ids = prompts.encode(prompt).ids
        assert (ids.count(1), ids.count(2)) == (2, 1)
        expected = unicodedata.normalize("NFC", "user\n" + prompt)
        end = len(ids) - len(prompts._tail)
        assert prompts._tokenizer.decode(list(ids[1:end]), skip_special_tokens=False) == expected


@given(words=st.integers(480, 700))
def test_what_is_too_long_loses_its_end_and_says_so(words):
    prompts = Prompts(type(small.tokenizer()).from_str(small.tokenizer().to_str()))
    prompt = " ".join(f"{i:04d}" for i in range(words))
    encoded = prompts.encode(prompt)
    assert len(encoded.ids) == MAX_TOKENS
    assert encoded.ids[-len(prompts._tail) :] == tuple(prompts._tail)
    assert encoded.cut
    kept = text_of(prompts, encoded.ids[1 : -len(prompts._tail)])
    assert kept + encoded.cut == "user\n" + prompt


def test_chinese_and_emoji(prompts):
    text = "白色背景上的🎨👩‍👩‍👧与“引号”"
    assert text in text_of(prompts, prompts.encode(text).ids)


@pytest.mark.live
@pytest.mark.parametrize(
    "text", ["a red circle", "\nleading newline", "白色 🎨", "", " spaces  kept ", "don't 123"]
)
def test_ids_are_those_of_the_reference(prompts, text):
    transformers = pytest.importorskip("transformers")
    from tests import reference

    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small.tokenizer(), pad_token="<|endoftext|>"
    )
    fast.chat_template = reference.TEMPLATE
    message = [{"role": "user", "content": text}]
    expected = fast(fast.apply_chat_template(message, tokenize=False, add_generation_prompt=True))[
        "input_ids"
    ]
    assert prompts.encode(text).ids == tuple(expected)


@given(tokens=st.integers(1, 512))
def test_buckets_are_few_and_fit(tokens):
    assert bucket(tokens) in (32, 64, 128, 256, 512)
    assert bucket(tokens) >= tokens
    assert bucket(tokens) == 32 or bucket(tokens) < 2 * tokens


def test_a_batch_is_padded_at_the_end(prompts):
    encoded = [
        prompts.encode("a"),
        prompts.encode("a much longer prompt than the other one, by far"),
    ]
    ids, lengths = batch_ids(encoded)
    assert ids.shape == (2, bucket(int(max(lengths))))
    for row, length, e in zip(ids, lengths, encoded, strict=True):
        assert tuple(row[:length]) == e.ids
        assert not row[length:].any()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"not json", "not a tokenizer.json"),
        (b"{}", "not a tokenizer.json"),
        (b'{"version": "1.0", "model": 3}', "not a tokenizer.json"),
    ],
)
def test_a_bad_tokenizer_is_one_line(tmp_path, content, words):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as fault:
        Prompts.load(file)
    assert words in str(fault.value)
    assert str(file) in str(fault.value)


def test_a_tokenizer_without_the_special_tokens_is_refused(tmp_path):
    data = json.loads(small.tokenizer().to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<|im_end|>"]
    vocab = data["model"]["vocab"]
    del vocab["<|im_end|>"]
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"<\|im_end\|> is not among"):
        Prompts.load(file)


def test_a_prompt_of_any_length_is_read_up_to_its_tokens(prompts):
    long = prompts.encode("a b " * 3_000_000)
    assert long.ids == prompts.encode("a b " * 20_000).ids
    assert len(long.ids) == MAX_TOKENS
    assert len(long.cut) > 11_000_000
