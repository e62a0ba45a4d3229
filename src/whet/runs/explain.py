"""`whet explain`: describe a run: its objective with numbers, its batch sizes and update counts, its trained roles."""

from collections.abc import Mapping
from typing import Any

from whet.errors import RecipeError
from whet.methods import catalogue, compose
from whet.methods.explain import differences, ending, online_lines, preference_ending, preference_lines, reward_lines
from whet.runs import checks
from whet.runs import recipe as fields
from whet.runs.slots import checked, rule_of
from whet.terminal import visible


def explanation(verb: str, recipe: Any) -> str:
    """Return the text for a resolved recipe. Raises RecipeError if a run would reject the method or the batch sizes."""
    parts: list[tuple[str, list[str]]]
    if isinstance(recipe, fields.OnlineRecipe):
        parts = _online(verb, recipe)
    elif isinstance(recipe, fields.OfflineRecipe):
        parts = _offline(verb, recipe)
    else:
        raise RecipeError(f"explain: {verb} trains nothing; explain a training verb, such as ppo or dpo")
    out = [_title(verb, getattr(recipe, "algorithm", {}))]
    for title, lines in parts:
        if lines:
            out += ["", f"{title}:", *lines]
    return visible("\n".join(out), layout=True)


def _title(verb: str, method: Mapping[str, Any]) -> str:
    table = {**catalogue.SUPERVISED, **catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE, **catalogue.PREFERENCE}
    if verb == "reward":
        one = catalogue.REWARD[method["name"]]
        return f"reward, {method['name']}: {one.about} [{one.source}]"
    return f"{verb}: {table[verb].about} [{table[verb].source}]"


def _online(verb: str, recipe: fields.OnlineRecipe) -> list[tuple[str, list[str]]]:
    slots = checked(verb, recipe.algorithm)
    longest, weights = recipe.sampling.max_new_tokens, [one.weight for one in recipe.reward] or [1.0]
    algorithm = compose.online_of(slots, longest=longest, weights=weights)
    mini_batch_size = checks.check_arithmetic(recipe, algorithm, verb)
    answers, prompts, epochs = (
        algorithm.collect.num_generations,
        recipe.rollout.prompts_per_step,
        recipe.rollout.ppo_epochs,
    )
    elements = prompts * (1 if algorithm.pairs else answers)
    what, rows = ("pairs", 2) if algorithm.pairs else ("answers", 1)
    per_epoch = -(-elements // mini_batch_size)
    updates = epochs * per_epoch
    arithmetic = [
        f"  {prompts} prompts x {answers} answers = {prompts * answers} answers a rollout, at most {longest} tokens each",
        f"  {elements} {what} in mini-batches of {mini_batch_size} = {per_epoch} updates, x {epochs} epochs = {updates} updates a rollout",
        f"  {recipe.rollout.num_steps} rollouts x {updates} = {recipe.rollout.num_steps * updates} updates in all",
        f"  at most {mini_batch_size * rows} x {longest} = {mini_batch_size * rows * longest} trained tokens an update; every count "
        "is global: micro-batches and packing change no number",
    ]
    if algorithm.collect.greedy:
        arithmetic.append(f"  and {prompts} greedy answers a rollout, as baselines")
    if algorithm.collect.dynamic_sampling:
        arithmetic.append(
            f"  groups without spread are replaced, for at most {algorithm.collect.dynamic_sampling} more rounds"
        )
    if any(term.stream == "ptx" for term in algorithm.terms):
        arithmetic.append(f"  {recipe.ptx.batch_size} pre-training rows beside each update")
    draw = recipe.sampling
    options = ", ".join(f"{name} {getattr(draw, name):g}" for name in ("temperature", "top_p", "top_k", "min_p"))
    sampled = [f"  {options}"]
    if draw.truncates:
        sampled.append(
            "  some tokens cannot be drawn: ratios are between the distributions over the recorded support, KL between the full ones"
        )
    objective = online_lines(slots, longest=longest, weights=weights)
    if updates == 1 and any("ratio" in one.columns for term in algorithm.terms for one in term.loss.walk()):
        arithmetic.append("  one update a rollout: the ratio is 1 there, so its bounds never act")
    cautions = [f"  {one}" for one in checks.cautions(recipe, algorithm)]
    try:
        checks.check_ptx(recipe, algorithm, verb)
    except RecipeError as error:
        cautions.append(f"  the run will be refused: {error}")
    return [
        ("objective, minimized", objective),
        ("where it ends", [f"  {one}" for one in ending(slots, truncates=recipe.sampling.truncates)]),
        ("arithmetic", arithmetic),
        ("sampling", sampled),
        ("optimizer", [f"  {one}" for one in checks.optim_lines(recipe, "critic" in algorithm.roles())]),
        ("trained and frozen", _roles(algorithm.roles(), recipe)),
        ("trained tokens", _tokens(slots)),
        ("differs", [f"  {one}" for one in differences(verb, recipe.algorithm)]),
        ("cautions", cautions),
    ]


def _offline(verb: str, recipe: fields.OfflineRecipe) -> list[tuple[str, list[str]]]:
    train = recipe.train
    length = f"{train.num_steps} updates" if train.num_steps else f"{train.num_epochs:g} epochs"
    arithmetic = [
        f"  {train.batch_size} elements an update, {length}; every count is global: micro-batches and packing change no number"
    ]
    tokens = (
        "  every token of the text"
        if verb == "pretrain"
        else "  the answers, their end token included; prompts are not"
    )
    lines, different, roles = ["  loss              mean over all trained tokens of -log pi"], [], ["  policy: trained"]
    ends: list[str] = []
    if isinstance(recipe, fields.PreferenceRecipe | fields.RewardModelRecipe):
        slots = checked(verb, recipe.algorithm)
        if isinstance(recipe, fields.RewardModelRecipe):
            compose.reward_of(slots)
            lines, roles = reward_lines(slots), ["  reward model: trained, with a linear head on the model"]
            different = differences(
                verb, {key: value for key, value in recipe.algorithm.items() if key != "name"}, recipe.algorithm["name"]
            )
        else:
            objective = compose.preference_of(slots)
            checks.check_reference(recipe, objective)
            lines, different = preference_lines(slots), differences(verb, recipe.algorithm)
            ends = [f"  {one}" for one in preference_ending(slots)]
            if "ref_logp" in objective.reads():
                follows = f"moves by {recipe.sync_reference.mix:g} towards the policy every {recipe.sync_reference.every} updates"
                roles.append(f"  reference: {follows if recipe.sync_reference.every else 'frozen'}")
    return [
        ("objective, minimized", lines),
        ("where it ends", ends),
        ("arithmetic", arithmetic),
        ("optimizer", [f"  {one}" for one in checks.optim_lines(recipe, False)]),
        ("trained and frozen", roles + _adapters(recipe.model)),
        ("trained tokens", [tokens]),
        ("differs", [f"  {one}" for one in different]),
    ]


def _roles(roles: frozenset[str], recipe: fields.OnlineRecipe) -> list[str]:
    out = ["  policy: trained"]
    if "critic" in roles:
        out.append(
            "  critic: trained, a model of its own" if recipe.trunk == "separate" else "  critic: trained, an adapter"
        )
    if "reference" in roles:
        every = recipe.rollout.sync_reference.every
        told = (
            f"moves by {recipe.rollout.sync_reference.mix:g} towards the policy every {every} rollouts"
            if every
            else "frozen"
        )
        out.append(f"  reference: {told}")
    out += [f"  reward {one.source}: weight {one.weight:g}, frozen" for one in recipe.reward]
    return out + _adapters(recipe.model)


def _adapters(model: fields.Model) -> list[str]:
    if model.lora is None:
        return []
    return [f"  by adapters of rank {model.lora.rank}; the weights under them are frozen"]


def _tokens(slots: Mapping[str, Any]) -> list[str]:
    out = ["  the answers, their end token included; prompts and what others write inside an answer are masked"]
    if rule_of(slots) == "mask":
        out.append("  answers cut off at the limit are masked")
    return out
