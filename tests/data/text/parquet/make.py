"""Makes the Parquet files of this folder. Run in it with pyarrow 26.0.1; other versions write the same
rows in other bytes.

The rows are those of turns.parquet, chats.parquet and sharegpt.parquet in every compression, page
version and encoding that files in the wild have, and some that are refused.
"""

import datetime

import pyarrow as pa
import pyarrow.parquet as pq

TURNS = {
    "prompt": ["你好", "bare", None, "2024", "long " * 300],
    "response": ["你好！", "query", "no question", "3.5", "answer"],
    "history": [[["q", "a"], ["问", "答"]], [], None, None, [["x", None]]],
    # Not asked for, of types that have no form as text.
    "when": [datetime.datetime(2024, 1, 1)] * 5,
    "picture": [b"\xff\xfe"] * 5,
}

CHATS = [
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "1+1?"), ("assistant", "2")],
    [("user", "\"quoted\" \\ 你😀\n"), ("assistant", "tab\there")],
    [("user", "a"), ("assistant", "b"), ("user", "nobody answers")],
    [],
    None,
    [("user", f"question {n // 2}") if n % 2 == 0 else ("assistant", f"answer {n // 2}") for n in range(40)],
    [("user", "last"), ("assistant", "row")],
]

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
FROM = pa.struct([("from", pa.large_string()), ("value", pa.large_string())])


def chats(names, kind):
    def row(chat):
        return None if chat is None else [dict(zip(names, message)) for message in chat]

    return pa.array([row(chat) for chat in CHATS], pa.list_(kind))


def write(name, table, **options):
    options = {"compression": "snappy", "write_statistics": True} | options
    pq.write_table(table, name + ".parquet", **options)


turns = pa.table(TURNS)
write("turns", turns)
write("turns_numbers", pa.table({
    "prompt": pa.array([1, -2, 2**62], pa.int64()),
    "response": pa.array([0.5, 3.0, None], pa.float64()),
    "history": pa.array([True, None, False], pa.bool_()),
    "small": pa.array([1, 2, 3], pa.uint8()),
}))
write("unsigned", pa.table({
    "prompt": pa.array([2**64 - 1, 7], pa.uint64()),
    "response": pa.array([1.25, 0.1], pa.float32()),
}))
write("dates", pa.table({"prompt": [datetime.date(2024, 1, 1)], "response": ["x"]}))
write("binary", pa.table({"prompt": [b"fine", b"\xff"], "response": ["x", "y"]}))

messages = pa.table({"messages": chats(("role", "content"), MESSAGE), "id": list(range(len(CHATS)))})
write("chats", messages)
for codec in ("none", "gzip", "zstd", "lz4", "brotli"):
    write(f"chats_{codec}", messages, compression=codec)
write("chats_groups", messages, row_group_size=2, compression="zstd", data_page_version="2.0")
# Pages of a few bytes, so that rows go on from page to page.
write("chats_pages", messages, use_dictionary=False, data_page_size=16, write_batch_size=1)
write("chats_delta", messages, use_dictionary=False, data_page_version="2.0", compression="none",
      column_encoding={"messages.list.element.role": "DELTA_LENGTH_BYTE_ARRAY",
                       "messages.list.element.content": "DELTA_LENGTH_BYTE_ARRAY",
                       "id": "DELTA_BINARY_PACKED"})
write("chats_prefixes", messages, use_dictionary=False,
      column_encoding={"messages.list.element.role": "DELTA_BYTE_ARRAY"})

sharegpt = pa.table({
    "conversations": chats(("from", "value"), FROM),
    "system": ["", "Be kind.", None, "", "", "", ""],
})
write("sharegpt", sharegpt, compression="zstd", row_group_size=3)
write("empty", messages.slice(0, 0))
# A page of 300 MiB in a few kilobytes.
write("bomb", pa.table({"prompt": ["0" * (300 << 20)], "response": ["x"]}), compression="zstd",
      use_dictionary=False, write_statistics=False)
