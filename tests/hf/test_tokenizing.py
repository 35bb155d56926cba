"""Text to ids and back, text as it streams, and chat templates: strangers' programs that run in a sandbox."""

import json
import shutil
from dataclasses import replace
from datetime import datetime

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import hf.tokenizer
from checkpoints import TEXT, TOKENIZERS, make_checkpoint, write_json
from cli.main import main
from generate import load
from hf.tokenizer import ChatHistory, TextStream, without_stop


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One checkpoint per kind of tokenizer."""
    return {kind: make_checkpoint(tmp_path_factory.mktemp(kind), kind) for kind in TOKENIZERS}


@pytest.fixture(scope="session")
def tokenizers(folders):
    return {kind: load(str(folder))[1] for kind, folder in folders.items()}


every_kind = pytest.mark.parametrize("kind", TOKENIZERS)
byte_level = pytest.mark.parametrize("kind", ["tokenizers"])
letters = "".join(sorted(set("the cat\n\t 3é日本語🙂👩‍👩‍👧 \x00<>|\ufffd")))
texts = st.text(letters, max_size=20)


# ---- ids


@every_kind
@given(text=texts)
def test_a_text_comes_back_from_its_ids(tokenizers, kind, text):
    assert tokenizers[kind].decode(tokenizers[kind].encode(text)) == text


@pytest.mark.parametrize("kind, bos", {"sentencepiece": 1, "unprefixed": 1, "tokenizers": 0, "converted": 1}.items())
@pytest.mark.parametrize("text", ["the cat", ""])
def test_a_prompt_starts_with_one_bos(tokenizers, kind, bos, text):
    ids = tokenizers[kind].encode(text)
    assert ids[0] == bos and bos not in ids[1:]


def test_a_sentencepiece_checkpoint_may_ask_for_no_bos(folders, tmp_path):
    folder = shutil.copytree(folders["sentencepiece"], tmp_path / "copy")
    with_bos = load(str(folder))[1].encode("the cat")
    write_json(folder / "tokenizer_config.json", {"add_bos_token": False})
    assert load(str(folder))[1].encode("the cat") == with_bos[1:]


@every_kind
@given(before=texts.filter(bool), text=texts)
def test_a_text_that_follows_another_one_brings_no_space_of_its_own(tokenizers, kind, before, text):
    ids = tokenizers[kind].encode(before) + tokenizers[kind].encode_after(text)
    assert tokenizers[kind].decode(ids) == before + text


@pytest.mark.parametrize("kind, token, stop", [("sentencepiece", "</s>", 2), ("tokenizers", "<|end|>", 1)])
def test_the_stop_token_that_a_template_repeats_is_read_once_whatever_space_is_before_it(tokenizers, kind, token, stop):
    tokenizer = tokenizers[kind]
    for space in ("", " ", "\n  \n"):
        ids = tokenizer.encode_after(f"{space}{token}the")
        assert without_stop(tokenizer, ids, stop) == ids[ids.index(stop) + 1 :] != []
    for ids in (tokenizer.encode_after("the"), tokenizer.encode_after(f"the{token}")):
        assert without_stop(tokenizer, ids, stop) == ids
    ended_by_length = tokenizer.encode_after(f"{token}the")
    assert without_stop(tokenizer, ended_by_length, None) == ended_by_length


SPECIAL = {
    "sentencepiece": ("</s>", 2),
    "unprefixed": ("</s>", 2),
    "tokenizers": ("<|user|>", 2),
    "converted": ("</s>", 2),
}


@pytest.mark.parametrize("kind, token, wanted", [(kind, *special) for kind, special in SPECIAL.items()])
def test_a_special_token_in_a_text_becomes_its_id_and_is_not_shown(tokenizers, kind, token, wanted):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(f"the{token}cat{token}")
    assert ids.count(wanted) == 2 and ids[-1] == wanted
    assert tokenizer.decode(ids).replace(" ", "") == "thecat"


def test_tokens_added_beside_a_sentencepiece_model_are_special_too(folders, tmp_path):
    """Vicuna and the like: ids that follow the model's own, named in tokenizer_config.json alone."""
    folder = shutil.copytree(folders["sentencepiece"], tmp_path / "copy")
    added = {"310": {"content": "<|turn|>", "special": True}, "311": {"content": "<|turn|>+", "special": True}}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, "eos_token": "<|turn|>"})
    tokenizer = load(str(folder))[1]
    ids = tokenizer.encode("the<|turn|>+<|turn|>cat")
    assert [i for i in ids if i >= 310] == [311, 310]
    assert tokenizer.decode(ids).split() == ["the", "cat"]
    assert 310 in tokenizer.stop_ids


def with_settings(folder, tmp_path, **changes):
    """A copy of a checkpoint with other tokenizer settings; None removes one."""
    folder = shutil.copytree(folder, tmp_path / "settings")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    write_json(folder / "tokenizer_config.json", {name: value for name, value in settings.items() if value is not None})
    return folder


def added(**flags):
    return {"310": {"content": "<mask>", "special": True} | flags, "311": {"content": "<plain>", "special": False}}


FLAGS = {  # flags, text -> its parts: texts that sentencepiece cuts on its own, and ids (measured: transformers 4.57)
    "none": ({}, "the <mask> cat", ["the ", 310, " cat"]),
    "lstrip": ({"lstrip": True}, "the \n <mask> cat", ["the", 310, " cat"]),
    "lstrip, nothing but spaces": ({"lstrip": True}, "  <mask>cat", [310, "cat"]),
    "rstrip": ({"rstrip": True}, "the <mask> \n cat", ["the ", 310, "cat"]),
    "both": ({"lstrip": True, "rstrip": True}, "the <mask>  cat <mask>", ["the", 310, "cat", 310]),
    "single_word": ({"single_word": True}, "the <mask> cat", ["the ", 310, " cat"]),
    "single_word, inside one": ({"single_word": True}, "the<mask> cat", ["the<mask> cat"]),
    "single_word, before a full stop": ({"single_word": True}, "the <mask>.", ["the ", 310, "."]),
}


@pytest.mark.parametrize("flags, text, parts", FLAGS.values(), ids=FLAGS)
def test_an_added_token_takes_the_spaces_and_the_words_that_its_flags_say(folders, tmp_path, flags, text, parts):
    tokenizer = load(str(with_settings(folders["sentencepiece"], tmp_path, added_tokens_decoder=added(**flags))))[1]
    plain = tokenizer.backend.processor.encode
    wanted = [i for part in parts for i in (plain(part) if isinstance(part, str) else [part])]
    assert tokenizer.encode(text, bos=False) == wanted


def test_an_added_token_that_is_not_special_is_shown(folders, tmp_path):
    tokenizer = load(str(with_settings(folders["sentencepiece"], tmp_path, added_tokens_decoder=added())))[1]
    text = "the <plain> cat<plain><plain>a<mask>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("<mask>", "")
    assert "".join(stream(tokenizer, [[i] for i in ids])) == text.replace("<mask>", "")


LEGACY = {  # text -> pieces without legacy, and with it ("▁" alone is "_" here)
    "the cat": (["▁the", "▁cat"], ["▁the", "▁cat"]),
    "<|turn|>the": (["t", "h", "e"], ["▁the"]),
    "<|turn|> the": (["▁the"], ["▁", "▁the"]),
    "the<|turn|>": (["▁the"], ["▁the"]),
    " <|turn|>": (["▁", "▁"], ["▁", "▁"]),
}


@pytest.mark.parametrize("text, legacy, wanted", [(t, i == 1, w[i]) for t, w in LEGACY.items() for i in (0, 1)])
def test_without_legacy_no_space_is_put_after_a_special_token(folders, tmp_path, text, legacy, wanted):
    tokenizer = load(str(with_settings(folders["unprefixed"], tmp_path, legacy=legacy)))[1]
    ids = [i for i in tokenizer.encode(text, bos=False) if i != 310]
    spelt = "".join(map(tokenizer.backend.processor.id_to_piece, ids))
    assert spelt == "".join(wanted) and (310 in tokenizer.encode(text)) == ("turn" in text)


def test_a_space_that_a_text_begins_with_is_kept_by_models_that_drop_it(folders, tmp_path):
    """As transformers 4 does it; such models (nmt_nfkc) make one space of several."""
    folder = shutil.copytree(folders["unprefixed"], tmp_path / "copy")
    options = {"model_type": "bpe", "vocab_size": 300, "byte_fallback": True, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_prefix=str(folder / "tokenizer"), **options)
    tokenizer = load(str(folder))[1]
    assert tokenizer.encode("the cat", bos=False) == tokenizer.backend.processor.encode("x the cat")[1:]
    assert tokenizer.decode(tokenizer.encode("the  cat")) == "the cat"


@pytest.mark.parametrize("kind", ["sentencepiece", "unprefixed"])
def test_the_older_files_beside_a_sentencepiece_model_name_chat_tokens_and_their_stop(folders, tmp_path, kind):
    """added_tokens.json has ids, special_tokens_map.json roles; what has no role is shown."""
    folder = with_settings(folders[kind], tmp_path, added_tokens_decoder=None)
    write_json(folder / "added_tokens.json", {"<|im_start|>": 310, "<|im_end|>": 311, "<tool>": 312})
    roles = {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|im_start|>"]}
    write_json(folder / "special_tokens_map.json", roles)
    tokenizer = load(str(folder))[1]
    ids = tokenizer.encode("<|im_start|>the<tool><|im_end|>")
    assert [i for i in ids if i >= 310] == [310, 312, 311]
    assert tokenizer.decode(ids).split() == ["the<tool>"]
    assert tokenizer.stop_ids == [2, 311] and tokenizer.special["eos_token"] == "<|im_end|>"


def test_added_tokens_decoder_is_read_instead_of_the_older_files(folders, tmp_path):
    """As in transformers: they are left behind by older versions."""
    folder = with_settings(folders["sentencepiece"], tmp_path, added_tokens_decoder=added())
    write_json(folder / "added_tokens.json", {"<|im_end|>": 311})
    write_json(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    tokenizer = load(str(folder))[1]
    assert tokenizer.special["eos_token"] == "</s>" and tokenizer.backend.id_of("<|im_end|>") is None


ENDS = {  # tokenizer_class, add_bos_token, add_eos_token -> whether a bos and an eos are there (transformers 4.57)
    "nothing said": ("LlamaTokenizer", None, None, (True, False)),
    "no bos": ("LlamaTokenizer", False, None, (False, False)),
    "an eos": (None, None, True, (True, True)),
    "an eos alone": ("LlamaTokenizerFast", False, True, (False, True)),
    "a class that reads neither": ("PreTrainedTokenizerFast", False, True, (True, False)),
}


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "converted"])
@pytest.mark.parametrize("name, bos, eos, wanted", ENDS.values(), ids=ENDS)
def test_add_bos_token_and_add_eos_token_are_obeyed(folders, tokenizers, tmp_path, kind, name, bos, eos, wanted):
    if kind == "sentencepiece" and name == "PreTrainedTokenizerFast":
        pytest.skip("that class reads tokenizer.json alone")
    settings = {"tokenizer_class": name, "add_bos_token": bos, "add_eos_token": eos}
    tokenizer = load(str(with_settings(folders[kind], tmp_path, **settings)))[1]
    begin, end = ([tokenizer.backend.id_of(tokenizer.special[role])] for role in ("bos_token", "eos_token"))
    plain = tokenizers[kind].encode("the cat", bos=False)
    assert tokenizer.encode("the cat") == begin * wanted[0] + plain + end * wanted[1]
    assert tokenizer.encode("the cat", bos=False) == plain


def test_a_token_that_the_model_lacks_refuses_the_prompt_that_uses_it(folders, tmp_path):
    """Llama-2-13b and CodeLlama-34b conversions: a <pad> beyond the embedding. Here it has no id in any file."""
    tokens = {str(i): {"content": f"<{i}>"} for i in range(310, 320)}
    settings = {"pad_token": "<pad>", "added_tokens_decoder": tokens, "eos_token": "<eos>"}
    tokenizer = load(str(with_settings(folders["sentencepiece"], tmp_path, **settings)))[1]
    assert tokenizer.encode("the <319> cat")
    assert tokenizer.stop_ids == [2]
    with pytest.raises(ValueError, match=r"token 321 \('<pad>'\): the model knows 0 to 319"):
        tokenizer.encode("the <pad> cat")


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers"])
def test_two_bos_are_pointed_out_once(tokenizers, caplog, kind):
    hf.tokenizer.warn_once.cache_clear()
    tokenizer = tokenizers[kind]
    bos = tokenizer.special["bos_token"]
    for _ in range(2):
        ids = tokenizer.encode(f"{bos}the cat")  # as transformers gives them
        assert ids[0] == ids[1]
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{bos} twice" in warning


def test_where_both_files_are_there_the_tokenizer_json_is_read(folders, tokenizers, tmp_path):
    folder = shutil.copytree(folders["tokenizers"], tmp_path / "copy")
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", folder)
    assert load(str(folder))[1].encode("the cat") == tokenizers["tokenizers"].encode("the cat")


def test_a_file_that_pads_or_truncates_does_neither_here(folders, tokenizers, tmp_path):
    """Files saved in the midst of a training run carry its settings along."""
    folder = shutil.copytree(folders["tokenizers"], tmp_path / "copy")
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin|>", "pad_to_multiple_of": 64}
    saved["padding"] = {"strategy": "BatchLongest", "direction": "Right"} | pad
    write_json(folder / "tokenizer.json", saved)
    assert load(str(folder))[1].encode("a dog and a cat") == tokenizers["tokenizers"].encode("a dog and a cat")


@pytest.mark.parametrize("text", ["the cat", "a<|user|>b<|end|>", "naïve 日本語 🙂  \n", ""])
def test_ids_are_those_of_transformers(folders, tokenizers, text):
    for kind in ("tokenizers", "converted"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders[kind])
        assert tokenizers[kind].encode(text) == theirs(text)["input_ids"]


BROKEN = {
    "no unknown token": (models.WordLevel({"a": 0}), None),
    "a regex that backtracks for ever": (models.BPE(), pre_tokenizers.Split(Regex("(a+)+$"), "isolated")),
}


@pytest.mark.parametrize("model, splitter", BROKEN.values(), ids=BROKEN)
def test_a_tokenizer_that_fails_on_a_text_is_named(folders, tmp_path, model, splitter):
    """The second panics in Rust, which is no Exception."""
    folder = shutil.copytree(folders["tokenizers"], tmp_path / "copy")
    backend = Backend(model)
    if splitter:
        backend.pre_tokenizer = splitter
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer.json fails on the text 'aaaa"):
        load(str(folder))[1].encode("a" * 40 + "b")


# ---- text as it streams


def stream(tokenizer, chunks):
    """What is shown after each chunk, and at the end."""
    text = TextStream(tokenizer)
    return [*(text.push(list(chunk)) for chunk in chunks), text.push([], last=True)]


def cut(ids, data):
    chunks = []
    while ids:
        size = data.draw(st.integers(1, 4))
        chunks, ids = [*chunks, ids[:size]], ids[size:]
    return chunks


@every_kind
@given(text=texts, data=st.data())
def test_streamed_pieces_are_the_text_and_split_no_character(tokenizers, kind, text, data):
    text = text.replace("\ufffd", "")
    pieces = stream(tokenizers[kind], cut(tokenizers[kind].encode(text), data))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)


ANY = {  # no bytes where the decoder itself takes the text of a run of bytes back when one of them is broken
    "sentencepiece": st.integers(0, 309),
    "unprefixed": st.one_of(st.integers(0, 2), st.integers(259, 315)),
    "tokenizers": st.integers(0, 299),
    "converted": st.sampled_from([0, 1, 2, *range(259, 268)]),
}


@every_kind
@given(data=st.data())
def test_streamed_pieces_of_any_ids_are_their_text(tokenizers, kind, data):
    """Models write stray bytes and special tokens as well."""
    ids = data.draw(st.lists(ANY[kind], max_size=16))
    assert "".join(stream(tokenizers[kind], cut(ids, data))) == tokenizers[kind].decode(ids)


@every_kind
def test_a_special_token_between_two_words_costs_no_space_in_the_stream(tokenizers, kind):
    words = tokenizers[kind].encode("the cat the cat")
    ids = [i for word in words for i in (word, tokenizers[kind].stop_ids[0])]
    assert "".join(stream(tokenizers[kind], [[i] for i in ids])) == "the cat the cat"


@every_kind
@given(text=texts)
def test_text_is_shown_as_soon_as_it_is_whole(tokenizers, kind, text):
    ids = tokenizers[kind].encode(text)
    pieces = stream(tokenizers[kind], [[i] for i in ids])
    for n in range(1, len(ids) + 1):
        so_far = tokenizers[kind].decode(ids[:n])
        assert so_far.endswith("\ufffd") or "".join(pieces[:n]) == so_far


@every_kind
def test_a_character_of_four_tokens_comes_with_the_last(tokenizers, kind):
    ids = tokenizers[kind].encode("🦖")[-4:]
    assert stream(tokenizers[kind], [[i] for i in ids]) == ["", "", "", "🦖", ""]


def test_a_character_that_is_never_completed_is_shown_at_the_end(tokenizers):
    ids = tokenizers["tokenizers"].encode("cat🦖")[:-1]
    assert "".join(stream(tokenizers["tokenizers"], [ids])) == "cat\ufffd"


# ---- chat templates

HELLO = [{"role": "user", "content": "the cat"}]


def with_template(folders, tmp_path, template, file="chat_template.jinja"):
    """The byte-level checkpoint's tokenizer, with a template of one's own instead of its own."""
    folder = shutil.copytree(folders["tokenizers"], tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if file == "chat_template.jinja":
        (folder / file).write_text(template)
    elif template is None:
        del settings["chat_template"]
        write_json(folder / file, settings)
    else:
        write_json(folder / file, settings | {"chat_template": template})
    return folder


@pytest.fixture
def render(folders, tmp_path):
    """template, messages -> the prompt as a text (the byte-level tokenizer gives every text back)."""

    def render(template, messages=HELLO, **where):
        _, tokenizer = load(str(with_template(folders, tmp_path, template, **where)))
        return tokenizer.decode(tokenizer.chat(messages))

    return render


def test_a_conversation_becomes_the_templates_ids_with_one_bos_and_the_generation_prompt(tokenizers):
    tokenizer = tokenizers["tokenizers"]
    begin, end, user, assistant = (
        tokenizer.backend.id_of(f"<|{name}|>") for name in ("begin", "end", "user", "assistant")
    )
    plain = {text: tokenizer.encode(text)[1:] for text in ("the cat", "a dog", "🙂")}
    messages = [*HELLO, {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "🙂"}]
    turns = [user, *plain["the cat"], assistant, *plain["a dog"], user, *plain["🙂"]]
    assert tokenizer.chat(messages) == [begin, *turns, assistant]


def test_chat_ids_are_those_of_transformers(folders, tokenizers):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folders["tokenizers"])
    wanted = theirs.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert tokenizers["tokenizers"].chat(HELLO) == wanted


def test_a_sentencepiece_checkpoint_chats_too(folders, tmp_path):
    folder = shutil.copytree(folders["sentencepiece"], tmp_path / "copy")
    template = "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]"
    write_json(
        folder / "tokenizer_config.json",
        {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}},
    )
    tokenizer = load(str(folder))[1]
    assert tokenizer.chat(HELLO) == tokenizer.encode("[INST] the cat [/INST]")


# ---- what each turn of a conversation adds


@pytest.mark.parametrize(
    ("answer", "stop", "added"),
    [
        ("cat", None, "<|user|>a dog<|assistant|>"),
        ("cat", 1, "<|user|>a dog<|assistant|>"),
        (" cat ", None, "<|user|>a dog<|assistant|>"),  # as many templates, this one strips an answer
        ("", 1, "<|user|>a dog<|assistant|>"),
    ],
)
def test_a_turn_adds_what_the_template_puts_after_the_last_answer(folders, tmp_path, answer, stop, added):
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content.strip() }}{% endfor %}<|assistant|>"
    tokenizer = load(str(with_template(folders, tmp_path, template)))[1]
    history = ChatHistory(tokenizer)
    assert history.add_question("the cat") == (tokenizer.encode("<|user|>the cat<|assistant|>", bos=False), False)
    history.add_answer(answer, stop)
    assert history.add_question("a dog") == (tokenizer.encode(added, bos=False), True)


@pytest.mark.parametrize(
    ("answer", "stop", "added"),
    [
        ("cat", 1, "<|user|><|assistant|>"),
        (" cat ", 1, "<|user|><|assistant|>"),
        ("", 1, "<|user|><|assistant|>"),
        ("cat", None, "<|end|><|user|><|assistant|>"),
    ],
)
def test_the_stop_token_that_ends_an_answer_is_read_once(tokenizers, answer, stop, added):
    """Token 1 is <|end|>: the template writes it, and so did the model if it ended with it."""
    tokenizer = tokenizers["tokenizers"]
    history = ChatHistory(replace(tokenizer, template=
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content.strip() }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}<|assistant|>"
    ))  # fmt: skip
    history.add_question("the")
    history.add_answer(answer, stop)
    ids, continues = history.add_question("")
    assert continues and ids == tokenizer.encode(added, bos=False)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}",
        "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}{% endfor %}",
    ],
    ids=["the beginning is another", "the answer is left out"],
)
def test_a_template_that_changes_earlier_turns_gives_the_whole_conversation_again(tokenizers, template):
    tokenizer = replace(tokenizers["tokenizers"], template=template)
    history = ChatHistory(tokenizer)
    history.add_question("the cat")
    history.add_answer("mat", None)
    ids, continues = history.add_question("a dog")
    assert not continues and ids == tokenizer.chat(history.messages)


LIST = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}!"}]


@pytest.mark.parametrize(
    "template, file, wanted",
    [
        ("{{ messages[0].content }}!", "chat_template.jinja", "the cat!"),
        ("{{ messages[0].content }}!", "tokenizer_config.json", "the cat!"),
        (LIST, "tokenizer_config.json", "the cat!"),
    ],
    ids=["a file of its own", "tokenizer_config.json", "the default of several"],
)
def test_the_template_is_found_wherever_it_is_kept(render, template, file, wanted):
    assert render(template, file=file) == wanted


RENDERED = {
    "tags leave no lines behind": ("{% if true %}\na\n    {% endif %}\nb", "a\nb"),
    "loops may break": ("{% for i in [1, 2, 3] %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "12"),
    "JSON is left readable": ('{{ {"b": "<é>", "a": 1} | tojson }}', '{"b": "<é>", "a": 1}'),
    "JSON may be indented": ('{{ {"a": 1} | tojson(indent=1) }}', '{\n "a": 1\n}'),
    "text is no HTML": ('{{ "<&>" }}', "<&>"),
    "JSON has transformers' arguments": ('{{ "é" | tojson(True) }}', '"\\u00e9"'),
    "special tokens that are set": ("{{ bos_token[1:] ~ eos_token[1:] }}", "|begin|>|end|>"),
    "special tokens that are not set": ("{{ pad_token is defined or unk_token is defined }}", "False"),
    "the date is known": ('{{ strftime_now("%d %b %Y") }}', datetime.now().strftime("%d %b %Y")),
    "there are no tools": ("{{ tools is none and documents is none }}", "True"),
    "what is marked for training": ("{% generation %}a{% endgeneration %}b", "ab"),
    "unset names are false": ("{% if date_string is defined %}set{% else %}unset{% endif %}", "unset"),
}


@pytest.mark.parametrize("template, wanted", RENDERED.values(), ids=RENDERED)
def test_a_template_finds_what_transformers_gives_it(render, template, wanted):
    assert render(template) == wanted


@pytest.mark.parametrize("template", [template for template, _ in RENDERED.values()], ids=RENDERED)
def test_a_template_writes_what_it_writes_in_transformers(folders, tmp_path, template):
    folder = with_template(
        folders, tmp_path, template + "{{ [unk_token, pad_token, sep_token, add_generation_prompt] }}"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"pad_token": "<|end|>", "unk_token": "<|user|>"})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    wanted = theirs.apply_chat_template(HELLO, add_generation_prompt=True, tokenize=False)
    assert load(str(folder))[1].render(HELLO) == wanted


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
DOUBLING = "{% set x = namespace(y='a') %}{% for i in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}"
FAILING = {
    "loops that write nothing": ENDLESS + "{% endfor %}" * 3,
    "loops that write": ENDLESS + "{{ messages }}" + "{% endfor %}" * 3,
    "macros that call each other": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a text that doubles": DOUBLING,
    "a text of a terabyte": "{{ 'x' * 10000000 * 100000 }}",
    "a huge power": "{{ 9 ** 9 ** 9 }}",
    "an attribute escape": "{{ ''.__class__.__mro__ }}",
    "a format escape": "{{ '{0.__class__.__mro__}'.format('') }}",
    "a change to the conversation": "{{ messages.append(1) }}",
    "a huge range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "another file": "{% include '/etc/passwd' %}",
    "a syntax error": "{% if %}",
    "a name that is not there": "{{ nobody.content }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a sum of unlike things": "{{ messages + 1 }}",
    "a missing index": "{{ messages[7].content }}",
    "a wrong argument": "{{ messages[0].content.split(1, 2, 3) }}",
}


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING)
def test_a_template_that_fails_or_breaks_out_is_refused_in_one_line(capsys, folders, tmp_path, monkeypatch, template):
    monkeypatch.setattr("hf.template.SECONDS", 1)
    assert "the chat template fails" in chat_refusal(capsys, with_template(folders, tmp_path, template))


@pytest.mark.parametrize("escape", ["''|attr('__class__')", "raise_exception.__globals__"])
def test_what_the_sandbox_hides_reads_as_nothing(render, escape):
    assert render("[{{ " + escape + " }}]") == "[]"


def test_what_a_template_raises_is_passed_on_in_one_line(capsys, folders, tmp_path):
    template = "{{ raise_exception('Conversation roles\\nmust alternate!') }}"
    line = chat_refusal(capsys, with_template(folders, tmp_path, template))
    assert "the chat template fails: Conversation roles must alternate!" in line


@pytest.mark.parametrize(
    "template, named",
    {
        "none": (None, "no chat template"),
        "several, none the default": (LIST[:1], "no chat template"),
        "a list without names": ([{"template": "x"}], "chat_template"),
        "neither text nor list": ({"default": "x"}, "chat_template"),
    }.values(),
    ids=["none", "several, none the default", "a list without names", "neither text nor list"],
)
def test_chat_without_a_template_is_refused_in_one_line(capsys, folders, tmp_path, template, named):
    assert named in chat_refusal(capsys, with_template(folders, tmp_path, template, "tokenizer_config.json"))


def chat_refusal(capsys, folder):
    """The one line with which a conversation is refused, before its first turn."""
    status = main(["--checkpoint", str(folder), "--chat", "--prompt", "the cat", "--no-compile"])
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert lines[0].startswith("generate.py: error: ")
    return lines[0]
