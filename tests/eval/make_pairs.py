#!/usr/bin/env python3
"""Writes pairs.json: 200 generated pairs of answer and reference, with what the Python packages say of them.

Needs an environment of its own; nothing else in this repository needs Python's packages:

    python3 -m venv /tmp/eval && /tmp/eval/bin/pip install jieba==0.42.1 rouge_chinese==1.0.3 nltk==3.10.4 numpy
    /tmp/eval/bin/python tests/eval/make_pairs.py > tests/eval/pairs.json

The texts are made here, from phrases like those of advertisements. The values are computed as
ptuning/main.py of ChatGLM-6B does it, without its rounding. With a number as argument so many pairs
are made, from that number as seed, to compare more than the 200.
"""

import json
import logging
import random
import sys
import warnings

warnings.filterwarnings("ignore")
import jieba
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from rouge_chinese import Rouge

jieba.setLogLevel(logging.ERROR)

SUBJECTS = ["这件衬衫", "这款连衣裙", "本款T恤", "牛仔裤", "此款半身裙", "小香风外套", "卫衣", "针织衫", "阔腿裤", "A字裙", "西装", "一件风衣"]
LOOKS = ["简约大方", "宽松的版型", "修身显瘦", "甜美可爱的荷叶边", "撞色的条纹", "复古的印花", "V领的设计", "高腰的剪裁",
         "精致的刺绣", "做旧的破洞", "灯笼袖", "收腰的设计", "蕾丝拼接", "不规则的下摆", "纯色", "百褶"]
EFFECTS = ["穿在身上很显瘦", "凸显出女性的气质", "拉长腿部的线条", "十分百搭", "尽显优雅的魅力", "减龄又时尚", "遮住身材的小缺点",
           "舒适透气", "给人眼前一亮的感觉", "轻松穿出街头风", "修饰脸型", "满满的少女感"]
NAMES = ["杭研大厦", "小明硕士毕业于中国科学院计算所", "李小福是创新办主任", "于吉大", "欧阳雪琴", "王尼玛来到了卡拉OK厅", "永和服装饰品有限公司"]
ENGLISH = ["new", "T-shirt", "oversize", "the collar of this coat", "BF风", "vintage", "size XL", "iPhone15", "C++", "AT&T", "c#", "e-mail",
           "don't", "U.S.A.", "3D", "v1.2.3", "foo_bar", "a.b", "Hello World", "café", "naïve"]
DIGITS = ["100%", "3.14", "2-3", "99.9%", "2023-04-10", "1,000", "0.5cm", "12:30", "7.", ".5", "+86", "50%off", "１２３", "3.5.1", "1.a", "第2款"]
MARKS = ["，", "。", "！", "？", "、", "；", "：", "“好看”", "“真的吗？”", "……", "...", "......", "........", ".............",
         "?", "!", ".", ",", "(", "）", "~", "*", "#", "—", "《", "》", "\n", "\n\n", "\r\n", "\t", " ", "  ", "\u3000", "\u00a0", "\u001f", "。”", "。\n\n", "？。", "😀"]
RARE = ["𠮷野家", "㐂", "鿖", "豈", "ｶﾀｶﾅ", "カタカナ", "한국어", "é", "\u0301", "𝒳", "〇", "々"]
SINGLE = list("的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心学")


def clause(rng):
    return rng.choice(SUBJECTS) + rng.choice(["采用", "有着", "搭配", "融入了", ""]) + rng.choice(LOOKS) + "，" + rng.choice(EFFECTS)


def advertisement(rng, clauses):
    return "".join(clause(rng) + rng.choice(["，", "。", "，", "！", ""]) for _ in range(clauses))


def mixed(rng, parts):
    pools = [SUBJECTS, LOOKS, EFFECTS, NAMES, ENGLISH, DIGITS, MARKS, MARKS, RARE, SINGLE]
    return "".join(rng.choice(rng.choice(pools)) + rng.choice(["", "", " "]) for _ in range(parts))


def changed(rng, text):
    """The text with characters and pieces left out, doubled, moved or replaced."""
    chars = list(text)
    for _ in range(rng.randint(1, max(1, len(chars) // 4))):
        if not chars:
            break
        i = rng.randrange(len(chars))
        j = min(len(chars), i + rng.randint(1, 6))
        what = rng.randrange(4)
        if what == 0:
            del chars[i:j]
        elif what == 1:
            chars[i:i] = chars[i:j]
        elif what == 2:
            moved = chars[i:j]
            del chars[i:j]
            at = rng.randint(0, len(chars))
            chars[at:at] = moved
        else:
            chars[i:j] = list(rng.choice(rng.choice([LOOKS, ENGLISH, DIGITS, MARKS, SINGLE])))
    return "".join(chars)


def pair(rng, kind):
    if kind == "advertisement":
        label = advertisement(rng, rng.randint(1, 5))
        return changed(rng, label), label
    if kind == "other advertisement":
        return advertisement(rng, rng.randint(1, 5)), advertisement(rng, rng.randint(1, 5))
    if kind == "mixed":
        label = mixed(rng, rng.randint(2, 14))
        return changed(rng, label), label
    if kind == "other mixed":
        return mixed(rng, rng.randint(1, 14)), mixed(rng, rng.randint(1, 14))
    if kind == "repeated":
        piece = rng.choice([rng.choice(SINGLE), rng.choice(LOOKS), "好看。", "ha", "......", "1.2.", "\n \n"])
        return piece * rng.randint(1, 9), piece * rng.randint(1, 9) + rng.choice(["", rng.choice(EFFECTS)])
    if kind == "short":
        def short():
            return "".join(rng.choice(SINGLE + list("ab1.。?%")) for _ in range(rng.randint(1, 3)))
        return short(), short()
    if kind == "identical":
        text = rng.choice([advertisement, mixed])(rng, rng.randint(1, 6))
        return text, text
    if kind == "disjoint":
        return advertisement(rng, 2), "the quick brown fox " * rng.randint(1, 3)
    if kind == "empty":
        blank = rng.choice(["", " ", "\n", "\u3000 \t"])
        return rng.choice([(blank, clause(rng)), (blank, blank), (clause(rng), blank)])
    raise ValueError(kind)


KINDS = (["advertisement"] * 8 + ["other advertisement"] * 3 + ["mixed"] * 10 + ["other mixed"] * 6
         + ["repeated"] * 4 + ["short"] * 4 + ["identical"] * 2 + ["disjoint"] + ["empty"] * 2)


def scores(answer, label):
    words = [list(jieba.cut(text)) for text in (answer, label)]
    found = {"words": words}
    try:
        values = Rouge().get_scores(" ".join(words[0]), " ".join(words[1]))[0]
        found.update({name: 100 * value["f"] for name, value in values.items()})
        bleu = sentence_bleu([list(label)], list(answer), smoothing_function=SmoothingFunction().method3)
        found["bleu-4"] = 100 * bleu
    except ValueError:
        # The package raises where there is no word.
        found.update({"rouge-1": None, "rouge-2": None, "rouge-l": None, "bleu-4": None})
    return found


def main():
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    rng = random.Random(number)
    pairs = []
    for i in range(number):
        kind = KINDS[i % len(KINDS)]
        answer, label = (text.strip() for text in pair(rng, kind))
        pairs.append({"kind": kind, "answer": answer, "label": label, **scores(answer, label)})
    print("[")
    print(",\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs))
    print("]")


main()
