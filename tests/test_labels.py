"""What counts for the loss, over chat templates of the shapes that real models have.

Each label is held against the conversation spelled out piece by piece: what an answer's turn adds to what
the model read before it, and the token that ends it.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hopscotch_common.answers.labels import samples_of
from hopscotch_common.answers.prompts import prompt_ids
from hopscotch_common.errors import InputError

MARKS = ["<s>", "</s>", "<end_of_turn>", "<start_of_turn>", "<|user|>", "<|assistant|>", "<|end|>", "[INST]"]
MARKS += ["[/INST]", "[THINK]", "[/THINK]", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
EACH = "{{% for m in messages %}}{}{{% endfor %}}{{% if add_generation_prompt %}}{}{{% endif %}}"
CHATML = EACH.format("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n")
GEMMA = "<s>" + EACH.format(
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n",
    "<start_of_turn>model\n",
)
PHI = EACH.format("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n")
MISTRAL = "<s>" + EACH.format(
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}", ""
)
# The reasoning of earlier answers is left out, as Qwen 3 and DeepSeek do.
THINKING = EACH.format(
    "<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n"
    "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n",
    "<|im_start|>assistant\n",
)
OPENED = THINKING.removesuffix("{% endif %}") + "<think>\n{% endif %}"  # by the generation prompt
ENDLESS = EACH.format("{{ m.role }}: {{ m.content }}\n", "assistant: ")
# template -> (what ends generation, what a turn adds before and behind its content, turn of the prompt)
SHAPES = {
    "chatml": (CHATML, "<|im_end|>", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", ""),
    "chatml on a base tokenizer": (
        CHATML,
        "<|endoftext|>",
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "",
    ),
    "gemma": (GEMMA, "<end_of_turn>", "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n", "<s>"),
    "phi": (PHI, "<|end|>", "<|user|>\n{}<|end|>\n<|assistant|>\n", ""),
    "mistral": (MISTRAL, "</s>", "[INST] {}[/INST]", "<s>"),
    "thinking": (THINKING, "<|im_end|>", "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", ""),
}
ENDS = {"chatml on a base tokenizer": "<|im_end|>"}  # it is the template that ends a turn there


def tokenizer_of(template: str, trimmed: bool) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; trimmed: offsets leave spaces out, as Llama 3's do."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({t: i for i, t in enumerate([*MARKS, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder, made.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=trimmed)
    made.add_special_tokens(MARKS)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", chat_template=template)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("content", ["2", "  2, and\n\n é 😀 [INST]x", "<|MASK|> and <|UNMASK_BEGIN|>\n\n"])
def test_an_answer_and_its_end_of_turn_count(shape, content, trimmed):
    template, ends, turn, head = SHAPES[shape]
    tokenizer = tokenizer_of(template, trimmed)
    stop = set(tokenizer.encode(ends, add_special_tokens=False))
    messages = [("user", "1 + 1?"), ("assistant", content), ("user", "Again"), ("assistant", "Two")]
    record = {"messages": [{"role": role, "content": text} for role, text in messages]}
    (sample,) = samples_of(("here", record), tokenizer, stop)
    said = content.strip() if shape == "gemma" else content
    end = ENDS.get(shape, ends)
    space, line = (" ", "") if shape == "mistral" else ("", "\n")
    pieces = [
        (head + turn.format("1 + 1?"), f"{space}{said}{end}"),
        (line + turn.format("Again"), f"{space}Two{end}"),
        (line, ""),
    ]
    ids, labels = [], []
    for skipped, counted in pieces:
        left, right = (tokenizer.encode(text, add_special_tokens=False) for text in (skipped, counted))
        ids += left + right
        labels += [-100] * len(left) + right
    assert sample == {"input_ids": ids, "labels": labels}


def test_earlier_turns_with_reasoning_count_as_they_were_said():
    tokenizer = tokenizer_of(THINKING, False)
    stop = set(tokenizer.encode("<|im_end|>"))
    answers = [
        {"role": "assistant", "content": "2", "reasoning_content": "one and one"},
        {"role": "assistant", "content": "<think>\ntwo and two\n</think>\n\n4"},
    ]
    asked = [{"role": "user", "content": text} for text in ("1 + 1?", "2 + 2?")]
    record = {"messages": [asked[0], answers[0], asked[1], answers[1]]}
    samples = samples_of(("here", record), tokenizer, stop)
    counted = [[token for token in sample["labels"] if token != -100] for sample in samples]
    assert [tokenizer.decode(ids) for ids in counted] == [
        "<think>\none and one\n</think>\n\n2<|im_end|>",
        "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
    ]
    assert "one and one" not in tokenizer.decode(samples[1]["input_ids"])


@pytest.mark.parametrize(
    ("template", "message", "said"),
    [
        (THINKING, {"content": "\n <think>\nfoo\n</think>\n\nbar"}, "<think>\nfoo\n</think>\n\nbar"),
        (
            THINKING,
            {"content": "It ends with </think>", "reasoning_content": "foo"},
            "<think>\nfoo\n</think>\n\nIt ends with </think>",
        ),
        (THINKING, {"content": "The tag </think> ends it."}, "The tag </think> ends it."),
        (OPENED, {"content": "foo</think>bar"}, "foo\n</think>\n\nbar"),
        (OPENED, {"content": "A <think> and a </think>."}, "A <think> and a </think>."),
    ],
)
def test_reasoning_is_set_apart_once_and_only_where_it_is_a_thought(template, message, said):
    tokenizer = tokenizer_of(template, False)
    record = {"messages": [ASKED, {"role": "assistant", **message}]}
    (sample,) = samples_of(("here", record), tokenizer, set(tokenizer.encode("<|im_end|>")))
    counted = [token for token in sample["labels"] if token != -100]
    assert tokenizer.decode(counted) == f"{said}<|im_end|>"


@pytest.mark.parametrize("shape", SHAPES)
def test_what_nothing_asked_for_does_not_count(shape):
    template, ends, *_ = SHAPES[shape]
    tokenizer = tokenizer_of(template, False)
    stop = set(tokenizer.encode(ends, add_special_tokens=False))
    begins = {"role": "assistant", "content": "Hello"}
    before = [{"role": "system", "content": "Be brief."}] if shape.startswith("chatml") else []
    (sample,) = samples_of(("here", {"messages": [*before, begins, ASKED, ANSWERED]}), tokenizer, stop)
    counted = [token for token in sample["labels"] if token != -100]
    assert tokenizer.decode(counted).strip() == f"It is 51.{ENDS.get(shape, ends)}"
    assert "Hello" in tokenizer.decode(sample["input_ids"])
    with pytest.raises(InputError, match="here: has an answer to nothing"):
        samples_of(("here", {"messages": [*before, begins]}), tokenizer, stop)


ASKED = {"role": "user", "content": "17 * 3?"}
ANSWERED = {"role": "assistant", "content": "It is 51."}
REASONED = {**ANSWERED, "reasoning_content": "10 * 3 + 7 * 3"}


@pytest.mark.parametrize(
    ("template", "messages", "left_out"),
    [
        (CHATML, [ASKED, REASONED], "reasoning_content"),
        (CHATML, [ASKED, REASONED, ASKED, ANSWERED], "reasoning_content"),
        (CHATML, [ASKED, {**ANSWERED, "reasoning_content": "\n", "tool_calls": []}], None),
        (THINKING, [ASKED, REASONED], None),
        (THINKING, [ASKED, REASONED, ASKED, ANSWERED], None),  # once as it was said, and then left out
    ],
)
def test_what_the_template_has_no_place_for_is_refused(template, messages, left_out):
    tokenizer = tokenizer_of(template, False)
    if left_out is None:
        assert samples_of(("here", {"messages": messages}), tokenizer, set())
        return
    message = f"^here: the model's chat template leaves out '{left_out}' of the last message; .* give"
    with pytest.raises(InputError, match=message):
        samples_of(("here", {"messages": messages}), tokenizer, set())


THINKS = EACH.format(
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n[THINK]\n"
)
BEHIND = PHI + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
UNENDED = EACH.format(
    "{{ m.role }}: {% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]{% endif %}"
    "{{ m.content }}\n",
    "assistant: ",
)
OTHERWISE = EACH.format(  # the last message in brackets
    "<|im_start|>{{ m.role }}\n{{ '(' if loop.last }}{{ m.content }}{{ ')' if loop.last }}<|im_end|>\n",
    "<|im_start|>assistant\n",
)


@pytest.mark.parametrize(
    ("template", "ends", "answer", "said"),
    [
        (THINKS, "<|im_end|>", "[THICK] 4", "[THICK] 4<|im_end|>"),  # begins as the generation prompt goes on
        (THINKS, "<|im_end|>", "[THINK]\nHm.[/THINK] 4", "Hm.[/THINK] 4<|im_end|>"),
        (BEHIND, "<|end|>", "text", "text<|end|>"),  # a part of what stands behind the answer
        (BEHIND, "<|end|>", "d", "d<|end|>"),
        (
            UNENDED,
            "<|end|>",
            "<think>2 + 2 is 4</think>4",
            "[THINK]2 + 2 is 4[/THINK]4",
        ),  # in the reasoning, too
    ],
)
def test_all_of_an_answer_counts_and_nothing_else(template, ends, answer, said):
    tokenizer = tokenizer_of(template, False)
    record = {"messages": [ASKED, {"role": "assistant", "content": answer}]}
    (sample,) = samples_of(("here", record), tokenizer, set(tokenizer.encode(ends)))
    assert tokenizer.decode([token for token in sample["labels"] if token != -100]) == said


def test_a_conversation_that_the_answer_changes_is_refused():
    tokenizer = tokenizer_of(OTHERWISE, False)
    twice = [ASKED, {"role": "assistant", "content": "Let me see."}, ANSWERED]
    with pytest.raises(InputError, match="^here: .* writes what stands before answer 2 otherwise .*; join"):
        samples_of(("here", {"messages": twice}), tokenizer, set(tokenizer.encode("<|im_end|>")))


def test_a_question_may_be_a_part_of_the_generation_prompt():
    tokenizer = tokenizer_of(OPENED, False)
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello!"}]}
    (sample,) = samples_of(("here", record), tokenizer, set(tokenizer.encode("<|im_end|>")))
    assert tokenizer.decode([token for token in sample["labels"] if token != -100]) == "Hello!<|im_end|>"


def test_a_plain_conversation_is_rendered_no_more_often_than_it_takes(monkeypatch):
    tokenizer = tokenizer_of(CHATML, False)
    rendered, apply = [], tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(1) or apply(*a, **k)
    )
    samples_of(("here", {"messages": [ASKED, ANSWERED]}), tokenizer, set())
    assert len(rendered) == 2  # with the answer, and without it
    record = {"messages": [ASKED, ANSWERED], "answer_token_ids": tokenizer.encode("It is 51.")}
    samples_of(("here", record), tokenizer, set())
    assert len(rendered) == 3


def test_where_nothing_ends_a_turn_the_answer_counts_alone():
    tokenizer = tokenizer_of(ENDLESS, False)
    record = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}
    (sample,) = samples_of(("here", record), tokenizer, set())
    assert tokenizer.decode([token for token in sample["labels"] if token != -100]) == "2"


@pytest.mark.parametrize("text", ["[THINK]abc[/THINK]def", "  spaces ", "4<|im_start|>", "café 😀"])
def test_an_answer_of_step_1_is_trained_on_token_for_token(text):
    tokenizer = tokenizer_of(CHATML, False)
    said = [*tokenizer.encode(text), *tokenizer.encode("<|im_end|>")]
    letters = [token for letter in text for token in tokenizer.encode(letter)]  # marks spelled out, too
    odd = [*letters, said[-1]]  # the text would be read as other tokens
    for answer, reason in ((said, "stop"), (said, None), (odd, "stop"), (letters, "length")):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        record = {"messages": messages, "answer_token_ids": answer, "finish_reason": reason}
        (sample,) = samples_of(("here", record), tokenizer, set())
        prompt = tokenizer.encode("<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n")
        assert sample == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    with pytest.raises(InputError, match="no list of token ids"):
        samples_of(("here", {"messages": messages, "answer_token_ids": ["4"]}), tokenizer, set())


def test_token_ids_that_do_not_read_as_the_answer_beside_them_are_refused():
    tokenizer = tokenizer_of(CHATML, False)
    ids, stop = tokenizer.encode("It is 4."), tokenizer.encode("<|im_end|>")
    message = "^here: 'answer_token_ids' do not .* another model.* edited; .*leave that field out"

    def counted(record: dict) -> list[int]:
        (sample,) = samples_of(("here", record), tokenizer, set(stop))
        return [label for label in sample["labels"] if label != -100]

    def check(content: str, answer: list[int], reason: str, refused: bool) -> None:
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        record = {"messages": messages, "answer_token_ids": answer, "finish_reason": reason}
        if not refused:
            assert counted(record) == answer
            return
        with pytest.raises(InputError, match=message):
            samples_of(("here", record), tokenizer, set())
        del record["answer_token_ids"]  # as the message says
        assert tokenizer.decode(counted(record)) == f"{content}<|im_end|>"

    check("It is 4.", ids + stop, "stop", refused=False)
    check("It is 4. #### 4", ids + stop, "stop", refused=True)
    check("It is 4", ids + stop, "stop", refused=True)
    check("It is 4.", ids, "length", refused=False)
    check("It is 4", ids, "length", refused=True)
    check("It is 4.", [300 - token for token in ids] + stop, "stop", refused=True)  # another model's
    check("It is 4.", [10**6] * 5, "stop", refused=True)


def test_the_prompt_is_the_one_that_the_model_read():
    """Which a template with a date, or one that has changed, would not make again."""
    dated = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + CHATML
    tokenizer = tokenizer_of(dated, False)
    turns = [("user", " 1 + 1? "), ("assistant", "<think>\nHm\n</think>\n\nadd(1, 1)"), ("user", "2 é")]
    text = "<|im_start|>system\n04 Jul 2001<|im_end|>\n"
    text += "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    prompt = tokenizer.encode(text + "<|im_start|>assistant\n")
    answer = tokenizer.encode("It is 2.<|im_end|>")
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "It is 2.")]]
    record = {"messages": messages, "prompt_token_ids": prompt, "answer_token_ids": answer}
    (sample,) = samples_of(("here", record), tokenizer, set())
    assert sample == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    messages[0]["content"] = "1 + 2?"
    with pytest.raises(InputError, match="^here: 'prompt_token_ids' do not hold the user message: .*leave"):
        samples_of(("here", record), tokenizer, set())
    with pytest.raises(InputError, match="^here: 'prompt_token_ids' is no list"):
        samples_of(("here", record | {"prompt_token_ids": ["1"]}), tokenizer, set())


def test_words_that_set_smollm3_s_template_need_not_stand_in_the_prompt():
    """It takes them out of the system message, and does what they say."""
    flagged = CHATML.replace("m.content }}", "m.content.replace('/no_think', '').rstrip() }}")
    tokenizer = tokenizer_of(flagged, False)
    messages = [{"role": "system", "content": "Be brief. /no_think"}, ASKED, ANSWERED]
    (sample,) = samples_of(("here", {"messages": messages}), tokenizer, set())
    assert tokenizer.decode(sample["input_ids"]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    record = {"messages": messages, "answer_token_ids": tokenizer.encode("It is 51.")}
    record["prompt_token_ids"] = prompt_ids(tokenizer, messages[:2], "here")
    assert samples_of(("here", record), tokenizer, set())
    messages[0]["content"] = "Be verbose. /no_think"
    with pytest.raises(InputError, match="do not hold the system message"):
        samples_of(("here", record), tokenizer, set())
    with pytest.raises(InputError, match="rewrites part of the user message; leave it out, or give another"):
        samples_of(
            ("here", {"messages": [{**ASKED, "content": "/no_think 17 * 3?"}, ANSWERED]}), tokenizer, set()
        )


def test_where_the_answer_costs_the_system_message_step_1_may_answer():
    """As in Mistral's templates, where it stands in the last message alone, if that is the user's."""
    tokenizer = tokenizer_of(
        EACH.format(
            "{% if m.role == 'user' %}[INST]{{ messages[0].content if loop.last }} {{ m.content }}[/INST]"
            "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}",
            "",
        ),
        False,
    )
    messages = [{"role": "system", "content": "Be brief."}, ASKED, ANSWERED]
    assert "Be brief. 17 * 3?" in tokenizer.decode(prompt_ids(tokenizer, messages[:2], "here"))
    with pytest.raises(
        InputError, match="part of the system message; leave it out, let step 1 answer it, or"
    ):
        samples_of(("here", {"messages": messages}), tokenizer, set())


def test_of_a_prompt_that_the_tokenizer_normalizes_its_tokens_are_taken():
    tokenizer = tokenizer_of(CHATML, False)
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase()]
    )
    prompt = tokenizer.encode("<|im_start|>user\nCAFE\u0301?<|im_end|>\n<|im_start|>assistant\n")
    assert "café?" in tokenizer.decode(prompt)
    messages = [{"role": "user", "content": "CAFE\u0301?"}, {"role": "assistant", "content": "4"}]
    record = {"messages": messages, "prompt_token_ids": prompt, "answer_token_ids": tokenizer.encode("4")}
    (sample,) = samples_of(("here", record), tokenizer, set())
    assert sample["input_ids"] == prompt + tokenizer.encode("4")


def test_of_an_answer_in_channels_the_final_one_must_stand_beside_the_ids():
    tokenizer = tokenizer_of(CHATML, False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|channel|>", "<|message|>"]})
    said = "<|channel|>analysis<|message|>Easy.<|end|><|channel|>final<|message|>It is 4.<|im_end|>"
    answer = tokenizer.encode(said)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "It is 4."}]
    (sample,) = samples_of(("here", {"messages": messages, "answer_token_ids": answer}), tokenizer, set())
    assert tokenizer.decode([label for label in sample["labels"] if label != -100]) == said


def test_instructlab_training_makes_the_same_of_plain_conversations(tiny_folder, tmp_path):
    """Where an answer ends with the tokenizer's eos, and says nothing of its own marks."""
    turns = ["What is 3 + 4, in a word?", "Seven — é.", "And in digits, please?", " 7\n\nof them"]
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    program = (
        "import sys\nfrom instructlab.training.data_process import process_messages_into_input_ids\n"
        "process_messages_into_input_ids(data_path=sys.argv[1], data_output_path=sys.argv[2],"
        " max_seq_len=500, model_path=sys.argv[3], num_cpu_procs=None)\n"
    )
    paths = [tmp_path / "in.jsonl", tmp_path / "out", tiny_folder()]
    subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)], check=True, capture_output=True, cwd=ROOT
    )
    theirs = json.loads((tmp_path / "out" / "data.jsonl").read_text())
    tokenizer = byte_tokenizer()
    (ours,) = samples_of(("here", {"messages": messages}), tokenizer, {tokenizer.eos_token_id})
    assert (ours["input_ids"], ours["labels"]) == (theirs["input_ids"], theirs["labels"])
