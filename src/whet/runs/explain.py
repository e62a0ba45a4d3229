"""`whet explain`: what a recipe's run will do - its objective with the numbers filled in, its arithmetic, who is trained."""

from collections.abc import Mapping
from typing import Any

from whet.methods import catalogue
from whet.runs import build
from whet.runs import recipe as fields
from whet.runs.slots import checked, rule_of
from whet.errors import RecipeError
from whet.methods import compose
from whet.methods.explain import differences, ending, online_lines, preference_lines, reward_lines


def explanation(verb: str, recipe: Any) -> str:
    """The text for a resolved recipe. Raises RecipeError where the run itself would refuse the method or its arithmetic."""
    parts: list[tuple[str, list[str]]]
    if isinstance(recipe, fields.Online):
        parts = _online(verb, recipe)
    elif isinstance(recipe, fields.Offline):
        parts = _offline(verb, recipe)
    else:
        raise RecipeError(f"explain: {verb} trains nothing; explain a training verb, such as ppo or dpo")
    out = [_title(verb, getattr(recipe, "method", {}))]
    for title, lines in parts:
        if lines:
            out += ["", f"{title}:", *lines]
    return "\n".join(out)


def _title(verb: str, method: Mapping[str, Any]) -> str:
    table = {**catalogue.ONLINE, **catalogue.ONLINE_PREFERENCE, **catalogue.PREFERENCE}
    if verb == "reward":
        one = catalogue.REWARD[method["name"]]
        return f"reward, {method['name']}: {one.about} [{one.source}]"
    if verb in table:
        return f"{verb}: {table[verb].about} [{table[verb].source}]"
    return f"{verb}: the mean over all trained tokens of -log pi"


def _online(verb: str, recipe: fields.Online) -> list[tuple[str, list[str]]]:
    slots = checked(verb, recipe.method)
    longest, weights = recipe.sampling.max_new_tokens, [one.weight for one in recipe.reward] or [1.0]
    algorithm = compose.online_of(slots, longest=longest, weights=weights)
    minibatch = build.check_arithmetic(recipe, algorithm, verb)
    answers, prompts, epochs = algorithm.collect.answers, recipe.rollout.prompts, recipe.rollout.epochs
    elements = prompts * (1 if algorithm.pairs else answers)
    what, rows = ("pairs", 2) if algorithm.pairs else ("answers", 1)
    per_epoch = -(-elements // minibatch)
    updates = epochs * per_epoch
    arithmetic = [
        f"  {prompts} prompts x {answers} answers = {prompts * answers} answers a rollout, at most {longest} tokens each",
        f"  {elements} {what} in mini-batches of {minibatch} = {per_epoch} updates, x {epochs} epochs = {updates} updates a rollout",
        f"  {recipe.rollout.steps} rollouts x {updates} = {recipe.rollout.steps * updates} updates in all",
        f"  at most {minibatch * rows} x {longest} = {minibatch * rows * longest} trained tokens an update; every count is global: "
        "micro-batches and packing change no number",
    ]
    if algorithm.collect.greedy:
        arithmetic.append(f"  and {prompts} greedy answers a rollout, as baselines")
    if algorithm.collect.refill:
        arithmetic.append(f"  groups without spread are replaced, for at most {algorithm.collect.refill} more rounds")
    if any(term.stream == "ptx" for term in algorithm.terms):
        arithmetic.append(f"  {recipe.ptx.batch} pre-training rows beside each update")
    draw = recipe.sampling
    dials = ", ".join(f"{name} {getattr(draw, name):g}" for name in ("temperature", "top_p", "top_k", "min_p"))
    sampled = [f"  {dials}"]
    if draw.truncates:
        sampled.append(
            "  some tokens cannot be drawn: ratios are between the distributions over the recorded support, KL between the full ones"
        )
    objective = online_lines(slots, longest=longest, weights=weights)
    if updates == 1 and any("ratio" in one.columns for term in algorithm.terms for one in term.loss.walk()):
        arithmetic.append("  one update a rollout: the ratio is 1 there, so its bounds never act")
    cautions = [f"  {one}" for one in build.cautions(recipe, algorithm)]
    try:
        build.check_ptx(recipe, algorithm, verb)
    except RecipeError as error:
        cautions.append(f"  the run will be refused: {error}")
    return [
        ("objective, minimised", objective),
        ("where it ends", [f"  {one}" for one in ending(slots, truncates=recipe.sampling.truncates)]),
        ("arithmetic", arithmetic),
        ("sampling", sampled),
        ("trained and frozen", _roles(algorithm.roles(), recipe)),
        ("trained tokens", _tokens(slots)),
        ("differs", [f"  {one}" for one in differences(verb, recipe.method)]),
        ("cautions", cautions),
    ]


def _offline(verb: str, recipe: fields.Offline) -> list[tuple[str, list[str]]]:
    train = recipe.train
    length = f"{train.steps} updates" if train.steps else f"{train.epochs:g} epochs"
    arithmetic = [
        f"  {train.batch} elements an update, {length}; every count is global: micro-batches and packing change no number"
    ]
    tokens = (
        "  every token of the text"
        if verb == "pretrain"
        else "  the answers, their end token included; prompts are not"
    )
    lines, different, roles = ["  loss              mean over all trained tokens of -log pi"], [], ["  policy: trained"]
    if isinstance(recipe, fields.Preference | fields.RewardModel):
        slots = checked(verb, recipe.method)
        if isinstance(recipe, fields.RewardModel):
            compose.reward_of(slots)
            lines, roles = reward_lines(slots), ["  reward model: trained, with a linear head on the model"]
            different = differences(
                verb, {key: value for key, value in recipe.method.items() if key != "name"}, recipe.method["name"]
            )
        else:
            objective = compose.preference_of(slots)
            build.check_reference(recipe, objective)
            lines, different = preference_lines(slots), differences(verb, recipe.method)
            if "ref_logp" in objective.reads():
                follows = f"moves by {recipe.refresh.mix:g} towards the policy every {recipe.refresh.every} updates"
                roles.append(f"  reference: {follows if recipe.refresh.every else 'frozen'}")
    return [
        ("objective, minimised", lines),
        ("arithmetic", arithmetic),
        ("trained and frozen", roles + _adapters(recipe.model)),
        ("trained tokens", [tokens]),
        ("differs", [f"  {one}" for one in different]),
    ]


def _roles(roles: frozenset[str], recipe: fields.Online) -> list[str]:
    out = ["  policy: trained"]
    if "critic" in roles:
        out.append(
            "  critic: trained, a model of its own" if recipe.trunk == "separate" else "  critic: trained, an adapter"
        )
    if "reference" in roles:
        every = recipe.rollout.refresh.every
        told = (
            f"moves by {recipe.rollout.refresh.mix:g} towards the policy every {every} rollouts" if every else "frozen"
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
