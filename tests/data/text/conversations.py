"""Makes chats.jsonl, sharegpt.json and conversations.json: conversations in both forms, and the ids and
labels that each generation's tokenizer makes of them by the rules of tokenizer/SPEC.md, written down
here once more.

    python3 -m venv venv && venv/bin/pip install sentencepiece==0.2.0 tiktoken==0.14.0
    venv/bin/python tests/data/text/conversations.py tests

The tests do not run this.
"""

import base64
import json
import re
import sys
from pathlib import Path

import sentencepiece
import tiktoken

TESTS = Path(sys.argv[1])
HERE = TESTS / "data/text"

# role, name of a tool, text, weight
CHATS = [
    [("user", "", "你好", 1), ("assistant", "", "你好！", 1), ("user", "", "再见", 1), ("assistant", "", "再见！", 1)],
    [("system", "", "Be brief.", 1), ("user", "", "hello", 1), ("assistant", "", "hi\nyou", 1)],
    [
        ("user", "", "a  b", 1),
        ("assistant", "", "not this", 0),
        ("user", "", "\ttab", 1),
        ("assistant", "", "this one", 1),
        ("user", "", "and now?", 1),
        ("assistant", "", "the last [gMASK] <sop> </s>", 1),
    ],
    [
        ("system", "", "You have tools.", 1),
        ("user", "", "weather?", 1),
        ("assistant", "get_weather", '{"city":"北京"}', 1),
        ("observation", "", "20 °C", 1),
        ("assistant", "", "It is warm.", 1),
        ("user", "", "and tomorrow?", 1),
        ("assistant", "", "Let me look.", 1),
        ("assistant", "get_weather", "{}", 1),
        ("observation", "", "", 1),
        ("assistant", "", "I do not know.", 1),
    ],
]


def has_tools(chat):
    return any(tool or role == "observation" for role, tool, _, _ in chat)


class V1:
    def __init__(self):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(TESTS / "tokenizer/v1.model"))
        self.gmask, self.sop, self.eop = (self.sp.piece_to_id(p) for p in ("[gMASK]", "<sop>", "<eop>"))

    def encode(self, text):
        text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
        for count in range(80, 1, -1):
            text = text.replace(" " * count, f"<|blank_{count}|>")
        return self.sp.encode(text)

    def rows(self, chat, train_all):
        if has_tools(chat):
            return None
        return rounds(self, chat, train_all)

    def prompt(self, turns, query):
        if not turns:
            return query
        text = "".join(f"[Round {n}]\n问：{q}\n答：{a}\n" for n, (q, a) in enumerate(turns))
        return f"{text}[Round {len(turns)}]\n问：{query}\n答："

    gap = "\n"

    def pair(self, prompt, answer):
        ids = prompt + [self.gmask, self.sop] + answer + [self.eop]
        return ids, len(prompt) + 1


class V2:
    gap = "\n\n"

    def __init__(self):
        self.sp = sentencepiece.SentencePieceProcessor(model_file=str(TESTS / "tokenizer/v2.model"))
        n = self.sp.get_piece_size()
        self.gmask, self.sop, self.eos = n + 1, n + 3, self.sp.eos_id()
        self.roles = {"system": n + 5, "user": n + 6, "assistant": n + 7, "observation": n + 8}
        self.close = self.eos

    def encode(self, text):
        return self.sp.encode(text)

    def rows(self, chat, train_all):
        if has_tools(chat):
            return None
        return rounds(self, chat, train_all)

    def prompt(self, turns, query):
        text = "".join(f"[Round {n}]\n\n问：{q}\n\n答：{a}\n\n" for n, (q, a) in enumerate(turns, 1))
        return f"{text}[Round {len(turns) + 1}]\n\n问：{query}\n\n答："

    def pair(self, prompt, answer):
        head = [self.gmask, self.sop] + prompt
        return head + answer + [self.eos], len(head)


def rounds(model, chat, train_all):
    turns, rows, system = [], [], ""
    for role, _, text, weight in chat:
        if role == "system":
            system = text + model.gap
        elif role == "user":
            query, system = system + text, ""
        else:
            ids, start = model.pair(model.encode(model.prompt(turns, query)), model.encode(text))
            rows.append((ids, [-100] * start + ids[start:]) if weight else None)
            turns.append((query, text))
    rows = rows if train_all else rows[-1:]
    return [row for row in rows if row]


class V3(V2):
    def rows(self, chat, train_all):
        ids, labels = [self.gmask, self.sop], [-100, -100]
        asked = max(index for index, message in enumerate(chat) if message[0] == "user")
        learns = False
        for index, (role, tool, text, weight) in enumerate(chat):
            head = self.roles[role]
            ids.append(head)
            # The token of the next role is where the model stops.
            labels.append(head if learns else -100)
            body = self.encode(tool + "\n") + self.encode(text)
            learns = role == "assistant" and weight == 1 and (train_all or index > asked)
            ids += body
            labels += body if learns else [-100] * len(body)
        ids.append(self.close)
        labels.append(self.close if learns else -100)
        return [(ids, labels)]


class Glm4(V3):
    def __init__(self):
        lines = (TESTS / "tokenizer/glm4/tokenizer.model").read_text().split("\n")
        ranks = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines if line}
        source = (TESTS / "tokenizer/glm4/make.py").read_text()
        pattern = "".join(re.findall(r'^    r"(.*)"$', source.split("PATTERN = (")[1].split("\n)")[0], re.M))
        self.bpe = tiktoken.Encoding("glm4", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        n = len(ranks)
        self.gmask, self.sop = n + 2, n + 4
        self.roles = {"system": n + 6, "user": n + 7, "assistant": n + 8, "observation": n + 9}
        self.close = self.roles["user"]

    def encode(self, text):
        return self.bpe.encode(text, disallowed_special=())


def openai(chat):
    messages = []
    for role, tool, text, weight in chat:
        message = {"role": "tool" if role == "observation" else role, "content": text}
        if tool:
            call = {"name": tool, "arguments": text}
            message |= {"content": None, "tool_calls": [{"type": "function", "function": call}]}
        if role == "assistant" and weight == 0:
            message["weight"] = 0
        if text == "hello":
            message["content"] = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        messages.append(message)
    # A call stands in the message that goes before it, where there is one.
    for first, second in zip(messages[::-1][1:], messages[::-1]):
        if "tool_calls" in second and first["role"] == "assistant":
            first["tool_calls"] = second["tool_calls"]
            messages.remove(second)
    return {"messages": messages}


def sharegpt(chat):
    names = {"user": "human", "assistant": "gpt", "observation": "observation"}
    conversations, row = [], {}
    for role, tool, text, _ in chat:
        if role == "system":
            row["system"] = text
        elif tool:
            call = json.dumps({"name": tool, "arguments": json.loads(text)}, ensure_ascii=False)
            conversations.append({"from": "function_call", "value": call})
        else:
            conversations.append({"from": names[role], "value": text})
    return {"conversations": conversations} | row


rows = "".join(json.dumps(openai(chat), ensure_ascii=False) + "\n" for chat in CHATS)
(HERE / "chats.jsonl").write_text(rows)
(HERE / "sharegpt.json").write_text(
    json.dumps([sharegpt(chat) for chat in CHATS], ensure_ascii=False, indent=1) + "\n"
)

models = {"chatglm": V1(), "chatglm2": V2(), "chatglm3": V3()}
if (TESTS / "tokenizer/glm4/tokenizer.model").exists():
    models["glm4"] = Glm4()
snapshots = {}
for name, model in models.items():
    for turns in ("last", "all"):
        for form in ("messages", "sharegpt"):
            found = []
            for chat in CHATS:
                # ShareGPT has no weights.
                chat = [message[:3] + (1,) if form == "sharegpt" else message for message in chat]
                found += model.rows(chat, turns == "all") or []
            snapshots[f"{name} {form} {turns}"] = [{"input_ids": i, "labels": l} for i, l in found]
text = ",\n".join(f'"{name}": [\n' + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "]" for name, rows in snapshots.items())
(HERE / "conversations.json").write_text("{\n" + text + "\n}\n")
