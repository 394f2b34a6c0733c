#!/usr/bin/env python3
"""Makes the stand-in for GLM-4's tokenizer, and the pairs that Python tiktoken gives for it.

    python3 -m venv venv && venv/bin/pip install tiktoken==0.14.0 regex
    venv/bin/python tests/tokenizer/glm4/make.py tests/tokenizer/glm4

writes, always the same for the same versions,

    tokenizer.model   2,000 ranks: bytes, then merges learned from generated text
    tokenizer.json    the same ranks in the format of the Hugging Face tokenizers library
    pairs.jsonl       texts with their ids, and ids with their text
    chat.jsonl        conversations with their ids

`--texts N` adds N random texts (default 250) to pairs.jsonl. The tests do not run this.
"""

import argparse
import base64
import json
import random
from collections import Counter
from pathlib import Path

import regex
import tiktoken

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = [
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
]
RANKS = 2000

ENGLISH = (
    "the a model train data loss card memory stage block head weight token answer question please "
    "write code return value print list of numbers with for in while if else def class import from "
    "what is how do you can it's I'll we've they're don't I'm he'd good morning weather city river "
    "mountain Beijing Shanghai train station seven hundred pipeline parallel gradient step rate"
).split()
CHINESE = (
    "你好 世界 模型 训练 数据 损失 显卡 内存 阶段 回答 问题 请问 写一段 代码 返回 数值 列表 的 是 在 了 和 有 "
    "我们 他们 可以 今天 天气 城市 河流 山 北京 上海 车站 裙子 风格 面料 版型 显瘦 图案 长度 参数 梯度 步长 学习率 "
    "怎么样 为什么 因为 所以 如果 那么 谢谢 不客气 早上好 晚安"
).split()
LINES = ["\n", "\n\n", "\r\n", "    ", "\t", "  ", " ", ": ", "，", "。", "！", "？", ", ", ". ", "=", "()", "[0]", "{}", ";\n"]
AWKWARD = [
    "", " ", "  ", "\n", "\r", "\r\n", "\n\r\n\r", "\t", "\u3000", "\u00a0", "\u2028", "\u200b", "\ufeff", "\0", "\x7f", "\x1c",
    "é", "e\u0301", "\u0301", "ﬁ", "Ａ１（全角）", "①②③", "Ⅷ", "½", "٣٤٥٦", "१२३४", "𝟘𝟙𝟚𝟛", "ſ's", "it'ſ", "K", "İ", "ß",
    "😀", "👩\u200d👩\u200d👧\u200d👦", "🇨🇳🇩🇪", "👍🏽", "한국어", "\u1112\u1161\u11ab", "ไทย", "עברית", "العربية",
    "１２３４５６７", "1234567890", "3.14159", "-1,000,000", "0x1F", "a1b2c3", "it'S", "I'LL", "'s's's", "''", "' s",
    "<|user|>", "<|endoftext|>", "[gMASK]<sop>", "<|user|>\n<|assistant|>", "<sop", "<|", "a<|observation|>b", " [MASK] ",
    "x" * 300, "好" * 300, "ab " * 100, "1" * 100, "=" * 100, "\n" * 100, "." * 50 + "\n" * 5, "a\n" * 50, "\U0010fffd", "\ufffd",
]


def sentence(random_):
    """Words of both languages with what stands between them."""
    out = []
    for _ in range(random_.randint(1, 20)):
        kind = random_.random()
        if kind < 0.4:
            out.append(random_.choice(["", " "]) + random_.choice(ENGLISH))
        elif kind < 0.8:
            out.append(random_.choice(CHINESE))
        elif kind < 0.87:
            out.append(str(random_.randint(0, 10 ** random_.randint(1, 9))))
        else:
            out.append(random_.choice(LINES))
    return "".join(out)


def learn(texts):
    """The most frequent pair of every word's parts becomes the next rank."""
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    parts = {word: [bytes([b]) for b in word.encode()] for word in words}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < RANKS:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(parts[word], parts[word][1:]):
                pairs[pair] += count
        if not pairs:
            raise SystemExit("too little text for so many ranks")
        (left, right), _ = max(pairs.items(), key=lambda item: (item[1], item[0]))
        ranks[left + right] = len(ranks)
        for word, old in parts.items():
            new = []
            for part in old:
                if new and new[-1] == left and part == right:
                    new[-1] = left + right
                else:
                    new.append(part)
            parts[word] = new
    return ranks


def alphabet():
    """GPT-2's characters for bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def tokenizer_json(ranks):
    """The same ranks for the Hugging Face library, every way to a token as a merge."""
    letters = alphabet()

    def write(token):
        return "".join(letters[b] for b in token)

    merges = []
    for token, rank in ranks.items():
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        splits = [(a, b) for a, b in splits if a in ranks and b in ranks]
        merges += sorted(splits, key=lambda split: (ranks[split[0]], ranks[split[1]]))
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": len(ranks) + i, "content": name, **special} for i, name in enumerate(SPECIALS)]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {write(token): rank for token, rank in ranks.items()},
            "merges": [[write(a), write(b)] for a, b in merges],
        },
    }


def texts(random_, count):
    """Labelled texts: the awkward ones, then random ones."""
    for text in AWKWARD:
        yield "awkward", text
    for spaces in (3, 4, 7, 8, 79, 80, 81, 200):
        yield "spaces", "a" + " " * spaces + "b" + "\n" + " " * spaces
        yield "spaces", " " * spaces
        yield "spaces", " " * spaces + "1\r\n" + "\t" * spaces + "好"
    everything = [*AWKWARD, *LINES, *ENGLISH[:20], *CHINESE[:20]]
    ranges = [(0x20, 0x7E), (0x80, 0x24F), (0x300, 0x36F), (0x2000, 0x206F), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF)]
    for i in range(count):
        if i % 3 == 0:
            yield "sentence", " ".join(sentence(random_) for _ in range(random_.randint(1, 4)))
        elif i % 3 == 1:
            parts = (random_.choice(everything)[:40] for _ in range(random_.randint(1, 12)))
            yield "mixed", "".join(parts)
        else:
            pick = (random_.choice(ranges) for _ in range(random_.randint(1, 40)))
            yield "unicode", "".join(chr(random_.randint(*r)) for r in pick)


def chats(random_, encoding, count):
    """Conversations by the rule of GLM-4: each part encoded for itself."""
    special = encoding._special_tokens
    for _ in range(count):
        roles = ["system"] if random_.random() < 0.3 else []
        for _ in range(random_.randint(1, 3)):
            roles += ["user", "assistant"]
            if random_.random() < 0.3:
                roles += ["observation", "assistant"]
        if random_.random() < 0.5:
            roles.pop()
        ids = [special["[gMASK]"], special["<sop>"]]
        messages, written = [], []
        for i, role in enumerate(roles):
            call = role == "assistant" and roles[i + 1 : i + 2] == ["observation"]
            metadata = "get_weather" if call else ""
            content = random_.choice([sentence(random_), random_.choice(AWKWARD)])
            messages.append({"role": role, "metadata": metadata, "content": content})
            ids.append(special[f"<|{role}|>"])
            start = len(ids)
            ids += encoding.encode_ordinary(metadata + "\n") + encoding.encode_ordinary(content)
            if role == "assistant":
                # What closes it: the next role, or <|user|> behind the last.
                written.append([start, len(ids) + 1])
        ids.append(special["<|user|>" if roles[-1] == "assistant" else "<|assistant|>"])
        yield {"messages": messages, "ids": ids, "written": written}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--texts", type=int, default=250)
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)

    random_ = random.Random(4)
    ranks = learn([sentence(random_) for _ in range(1500)])
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "tokenizer.model").write_text("".join(lines))
    as_json = json.dumps(tokenizer_json(ranks), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(as_json + "\n")

    special = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    encoding = tiktoken.Encoding("glm4", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    with (folder / "pairs.jsonl").open("w") as out:

        def put(line):
            out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")

        for category, text in texts(random_, arguments.texts):
            ids = encoding.encode_ordinary(text)
            line = {"cat": category, "text": text, "ids": ids}
            parsed = encoding.encode(text, allowed_special="all")
            if parsed != ids:
                line["parsed"] = parsed
            if encoding.decode(ids) != text:
                raise SystemExit(f"{text!r} is not decoded")
            put(line)
        # Ids of no text: halves of characters, which decode to U+FFFD.
        for _ in range(arguments.texts // 5):
            ids = [random_.randrange(len(ranks) if random_.random() < 0.5 else 256) for _ in range(random_.randint(1, 12))]
            put({"cat": "ids", "ids": ids, "dec": encoding.decode(ids)})
    with (folder / "chat.jsonl").open("w") as out:
        for line in chats(random_, encoding, 30):
            out.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
