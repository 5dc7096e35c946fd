"""Control "shuffled map": each input latent looks up the row of another one."""

from dspa.baselines.matching import matched_permutation
from dspa.maps.cdmap import ConditionalDifferenceMap


def shuffled_map(cdmap: ConditionalDifferenceMap, seed: int) -> ConditionalDifferenceMap:
    """Return the map with its rows permuted among gates that are open on about as many prompts.

    Only gates with data, `n_open > 0`, take part. Rows of gates that are open on every prompt are all alike, so that
    what every prompt shares stays, and what a prompt's own latents add is that of others.

    Args:
        cdmap: the map.
        seed: of the permutation.
    """
    gates = (cdmap.n_open > 0).nonzero().flatten()
    values = cdmap.values.clone()
    values[gates] = cdmap.values[gates[matched_permutation(cdmap.n_open[gates], seed).to(gates.device)]]
    return cdmap.replaced(values=values)
