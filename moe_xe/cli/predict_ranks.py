"""What `moe-xe predict --ranks` prints: the predicted time of layers whose experts are spread over several devices."""
import json as jsonlib

from .tables import new_table, print_table, short


def predict_ranks(layers, rank_counts, token_counts, chunks, json: bool, plot) -> None:
    """layers: `bench.predictions.Layers` of each model, on one device."""
    found = [[each.predict(ranks, tokens, chunks) for ranks in rank_counts for tokens in token_counts] for each in layers]
    hidden = [{ranks: each.hidden_from(ranks, chunks) for ranks in rank_counts if ranks > 1} for each in layers]
    first, cases = layers[0], [(ranks, tokens) for ranks in rank_counts for tokens in token_counts]
    if plot:
        from ..bench.plot_predictions import plot_layers
        plot_layers([(each, list(zip(cases, predictions))) for each, predictions in zip(layers, found)], plot)
    if json:
        print(jsonlib.dumps({"predicted": True, "device": first.device.name, "link": first.link.name, "network": first.network.name,
                             "wire": first.wire, "wire_back": first.wire_back, "layers": [
            {"model": each.model.name, "ranks": ranks, "tokens": tokens, "chunks": layer.chunks, "ms": 1e3 * layer.seconds,
             "compute_ms": 1e3 * layer.compute, "communication_ms": 1e3 * layer.communication, "share": layer.share, "hidden": layer.hidden,
             "sent_bytes": layer.sent_bytes, "pair_bytes": layer.pair_bytes, "hidden_from": from_tokens.get(ranks)}
            for each, predictions, from_tokens in zip(layers, found, hidden)
            for (ranks, tokens), layer in zip(cases, predictions)]}, indent=1))
        return
    print(f"PREDICTED, not measured: {first.device.name}, {first.dtype.value}, {first.layout.value}\n"
          f"tokens: of each rank; linked by {first.link.name}, hosts of {first.link.ranks} by {first.network.name}\n"
          f"rows go as {first.wire or first.dtype.value} and come back as {first.wire_back or first.dtype.value}")
    for each, predictions, from_tokens in zip(layers, found, hidden):
        table = new_table("ranks", "tokens", "chunks", "layer\nms", "compute\nms", "comm.\nms", "share", "hid-\nden", "sent\nMB", "of\npairs",
                          title=each.model.name)
        for (ranks, tokens), layer in zip(cases, predictions):
            table.add_row(str(ranks), str(tokens), str(layer.chunks), *(short(1e3 * seconds) for seconds in (
                layer.seconds, layer.compute, layer.communication)), f"{layer.share:.0%}", f"{layer.hidden:.0%}", short(layer.sent_bytes / 1e6),
                          f"{layer.sent_bytes / layer.pair_bytes:.0%}" if ranks > 1 else "-")
        print_table(table)
        for ranks, tokens in from_tokens.items():
            print(f"{ranks} ranks: half of the communication hides " + (f"from {tokens} tokens on" if tokens else "for no number of tokens"))
    print("compute: without communication, in one chunk; comm.: by itself; share: what it\n"
          "adds to a layer; hidden: of it, behind computing; of pairs: of the bytes if each\npair of token and expert were sent by itself")
