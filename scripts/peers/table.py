"""The figures of a run, and its page."""

from statistics import median

PEERS = {
    "a": "(a) as its predecessors run it: eager attention, padded batches, PEFT",
    "b": "(b) PyTorch at its best",
    "transformers": "transformers + PEFT as installed",
}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def summary(comparison: dict) -> dict:
    """Tokens per second of every side, and ratios of time round by round."""
    rounds = comparison["rounds"]
    seconds = {side: [sum(this[side]["seconds"]) for this in rounds] for side in ["ours", *comparison["peers"]]}
    tokens = sum(rounds[0]["ours"]["tokens"])
    return {
        "tokens_per_round": tokens,
        "tokens_per_second": {side: spread([tokens / each for each in found]) for side, found in seconds.items()},
        "ratios": {peer: spread([ours / theirs for ours, theirs in zip(seconds["ours"], seconds[peer])])
                   for peer in comparison["peers"]},
    }


def three(found: dict, digits: int) -> str:
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def way(peer: dict) -> str:
    """How peer (b) ran."""
    options = peer.get("options")
    if options is None:
        return ""
    products = {"default": "MKL or cuBLAS", "onednn": "oneDNN"}[options["linear"]]
    compiled = {"none": "not compiled", "blocks": "blocks compiled", "whole": "compiled as a whole"}
    tries = [f"{sum(tried['seconds']):.2f}" for tried in peer["tries"] if "seconds" in tried]
    return f"{options['attention']}, {products}, {compiled[options['compile']]} (seconds tried: {', '.join(tries)})"


def page(document: dict) -> str:
    """Markdown."""
    machine = document["machine"]
    gpu = machine.get("gpu")
    where = f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"{machine['cpu']}, {document['threads']} threads"
    lines = [
        "# mp-train beside PyTorch", "",
        "Made by scripts/peers/compare.py; what is compared, and how: [PERFORMANCE.md](PERFORMANCE.md#peers).", "",
        f"{where}; {machine['date']}; commit {document['commit']}; load at the start "
        f"{machine['load_at_start'][0]:.1f}.", "",
        "Ratios are mp-train's seconds over the peer's for the same tokens, below 1 where mp-train is faster: median "
        "(lowest to highest) of the rounds. Tokens are real ones, padding is not counted.", "",
        "| comparison | peer | rounds | mp-train, tokens/s | peer, tokens/s | time of mp-train / time of peer |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for comparison in document["comparisons"]:
        found = comparison.get("summary")
        for peer in comparison["peers"]:
            lead = f"| {comparison['name']} ({comparison['size']}, {comparison['dtype']}) | {PEERS[peer]} "
            if found is None:
                lines.append(f"{lead}| 0 | | | not timed: losses differ |")
                continue
            rates = found["tokens_per_second"]
            lines.append(f"{lead}| {len(comparison['rounds'])} | {three(rates['ours'], 0)} | {three(rates[peer], 0)} "
                         f"| **{three(found['ratios'][peer], 3)}** |")
    lines += ["", "Rows of a round, and the check that came before it:", "",
              "| comparison | peer | rows | tokens | targets | padded | lengths | losses differ by | gradient norms by "
              "| attention of the peer | how it ran |",
              "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for comparison in document["comparisons"]:
        rows = comparison["rows"]
        for name, peer in comparison["peers"].items():
            parity = peer["parity"]
            kernels = ", ".join(f"`{kernel}`" for kernel in peer.get("attention", []) if "backward" not in kernel)
            lines.append(
                f"| {comparison['name']} | {name} | {rows['rows']} | {rows['tokens']} | {rows['targets']} "
                f"| {rows['padded_tokens']} | {rows['shortest']} to {rows['longest']}, median {rows['median']} "
                f"| {parity['loss_difference']:.0e} | {parity['grad_norm_difference']:.0e} | {kernels or 'eager'} "
                f"| {way(peer)} |")
    lines += ["", "Versions and the rate of a plain product in each peer's process:", ""]
    seen = []
    for comparison in document["comparisons"]:
        for name, peer in comparison["peers"].items():
            about = peer["about"]
            rates = ", ".join(f"{key} {rate:.0f} GFLOP/s" for key, rate in about["product_gflops"].items())
            seen.append(f"- {comparison['name']}, {name}: {rates}")
    versions = document["comparisons"][0]["peers"]
    first = next(iter(versions.values()))["about"]["versions"]
    lines.append("- " + ", ".join(f"{name} {version}" for name, version in first.items())
                 + (", MKL told that it may use AVX-512" if document["mkl_preload"] else ""))
    return "\n".join(lines + seen) + "\n"
