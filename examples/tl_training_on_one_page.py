"""TL-Training on one page: a LLaMA, SFT with MAE and PKT, PPO with the paper's reward, importing nothing of ours.

    python examples/tl_training_on_one_page.py        # bundled model and data, under a minute on one core

tests/test_one_page.py holds the page to the product: equal ids, targets, weights, logits, rewards, advantages, losses.
Equation numbers are those of docs/math.md. Left out: packing, several ranks, bf16, resuming, checks of the input.
Shape suffixes: B rows, T positions, L keys, D model dim, N heads, H head dim, V vocabulary.
"""

import ast
import copy
import json
import random
import re
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

MODEL_DIR, DATA_DIR = (Path(__file__).resolve().parent.parent / "assets" / name for name in ("tiny_model", "tiny_data"))
BOS, EOS, IMPLICIT_TOOLS = 1, 2, ("finish", "ask_to_user")  # the two tools are offered everywhere, listed or not


# 1. The model: a LLaMA. Parameters are named as in the safetensors file, less "model.", "self_attn." and "mlp." ------
class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, hidden, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        self.n_heads = config["num_attention_heads"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(D, hidden, bias=False), nn.Linear(D, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, D, bias=False)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(D, eps), nn.RMSNorm(D, eps)  # E15

    def forward(self, x_BTD, cos, sin, mask_B1TL, cache):
        B, T, D = x_BTD.shape
        h_BTD = self.input_layernorm(x_BTD)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(h_BTD).view(B, T, self.n_heads, -1).transpose(1, 2) for p in projections)  # (B, N, T, H) each
        q, k = (x * cos + torch.cat((-x.chunk(2, -1)[1], x.chunk(2, -1)[0]), -1) * sin for x in (q, k))  # E16
        if cache is not None:  # decoding: the keys and values of all earlier positions come first
            k, v = (torch.cat(pair, 2) for pair in zip(cache, (k, v))) if cache else (k, v)
            cache[:] = k, v
        attended_BNTH = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1TL)  # E17
        x_BTD = x_BTD + self.o_proj(attended_BNTH.transpose(1, 2).reshape(B, T, D))
        h_BTD = self.post_attention_layernorm(x_BTD)
        return x_BTD + self.down_proj(F.silu(self.gate_proj(h_BTD)) * self.up_proj(h_BTD))  # E18


class LLaMA(nn.Module):
    def __init__(self, folder):
        super().__init__()
        self.config = config = json.loads((folder / "config.json").read_text())
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        stored = load_file(folder / "model.safetensors")
        self.load_state_dict({re.sub(r"model\.|self_attn\.|mlp\.", "", name): stored[name] for name in stored})

    def forward(self, ids_BT, is_real_BL, caches=None):
        """Logits (B, T, V) and hidden states (B, T, D). is_real_BL: False on padding; ids_BT are its last T columns."""
        T, L, H = ids_BT.shape[1], is_real_BL.shape[1], self.config["head_dim"]
        omega_H = (self.config["rope_theta"] ** (-torch.arange(0, H, 2) / H)).repeat(2)
        angles_B1TH = (is_real_BL.cumsum(1) - 1)[:, None, L - T :, None] * omega_H
        causal_TL = torch.ones(T, L, dtype=torch.bool).tril(L - T)
        mask_B1TL = causal_TL & is_real_BL[:, None, None] | causal_TL.triu(L - T)  # padding may look at itself
        x_BTD = self.embed_tokens(ids_BT)
        for block, cache in zip(self.layers, caches or [None] * len(self.layers)):
            x_BTD = block(x_BTD, angles_B1TH.cos(), angles_B1TH.sin(), mask_B1TL, cache)
        hidden_BTD = self.norm(x_BTD)
        return hidden_BTD @ self.embed_tokens.weight.T, hidden_BTD  # the bundled model ties head and embeddings


# 2. The prompt (Table 13). Every piece is encoded alone, so a prompt is a prefix of the training row ------------------
START = sentencepiece.SentencePieceProcessor(model_file=str(MODEL_DIR / "tokenizer.model"))
NO_SPACE_BEFORE = b"\x1a\x02\x18\x00"  # add_dummy_prefix = false, for text in the middle of a row
MIDDLE = sentencepiece.SentencePieceProcessor(model_proto=START.serialized_model_proto() + NO_SPACE_BEFORE)


def render_tool(tool):
    properties, required = tool["parameters"]["properties"], tool["parameters"]["required"]
    order = required + [name for name in properties if name not in required]
    signature = ", ".join(f"{p}: {properties[p]['type']}{'' if p in required else ' = None'}" for p in order)
    lines = ["Function:", f"def {tool['name']}({signature}):", '    """', f"    {tool['description']}", "", "    Args:"]
    lines += [f"    {p} ({properties[p]['type']}): {properties[p]['description']}" for p in order]
    return "\n".join([*lines, '    """'])


def encode_pieces(tools, messages):
    """The row in pieces: (ids, index of the call that they spell, or None)."""
    pieces = [([BOS] + START.encode("System: " + "\n\n".join(map(render_tool, tools))), None)]
    for index, (role, *rest) in enumerate(messages):
        if role == "assistant":
            arguments = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in rest[1].items())
            pieces += [(MIDDLE.encode("\nAssistant:"), None), (MIDDLE.encode(f" {rest[0]}({arguments})"), index)]
        else:
            pieces.append((MIDDLE.encode(("\nUser: " if role == "user" else "\nOutput: ") + rest[0]), None))
    return pieces


def encode_prompt(tools, messages):
    return sum((ids for ids, _ in encode_pieces(tools, messages)), []) + MIDDLE.encode("\nAssistant:")


def read_trajectory(record):
    """(tools, messages): a message is ("user" | "function", text) or ("assistant", name, arguments)."""
    messages = []
    for role, content in ((turn["role"], turn["content"]) for turn in record["conversations"][1:]):
        name, _, arguments = content.partition("\n")
        messages.append((role, name, json.loads(arguments)) if role == "assistant" else (role, content))
    return json.loads(record["conversations"][0]["content"]), messages


# 3. MAE and PKT: which calls are trained, and what each of their tokens weighs ----------------------------------------
def is_erroneous(tools, messages, index):
    """Whether call `index` contradicts the documents or its feedback reports an error (E2)."""
    _, name, arguments = messages[index]
    documents = [tool["parameters"] for tool in tools if tool["name"] == name]
    fits = [set(d["required"]) <= set(arguments) <= set(d["properties"]) for d in documents]
    feedback = messages[index + 1][1] if index + 1 < len(messages) else ""
    reports_error = feedback.startswith("{") and bool(json.loads(feedback).get("error"))
    return reports_error or not (any(fits) if documents else name in IMPLICIT_TOOLS)


def key_token_weights(call_ids, other_names_ids, max_weight=9.0):
    """Key tokens K are the first and each that follows a prefix shared with another tool's name (E3)."""
    key_positions = {0}
    for other_ids in other_names_ids:
        shared = 0
        while shared < min(len(call_ids), len(other_ids)) and call_ids[shared] == other_ids[shared]:
            shared += 1
        key_positions |= {shared} if shared < min(len(call_ids), len(other_ids)) else set()  # E3
    weight = min(max((len(call_ids) - len(key_positions)) / len(key_positions), 1.0), max_weight)  # E4
    return [weight if position in key_positions else 1.0 for position in range(len(call_ids))]


def encode_trajectory(tools, messages):
    ids, targets, weights = [], [], []  # after a trained call the target is EOS; the weights of a call sum to 1
    for piece, index in encode_pieces(tools, messages):
        new_targets = piece[len(targets) - len(ids) + 1 :]  # context; EOS took the place of its first token
        new_weights = [0.0] * len(new_targets)
        if index is not None and not is_erroneous(tools, messages, index):  # E2: erroneous calls stay context
            names = dict.fromkeys(tool["name"] for tool in tools if tool["name"] != messages[index][1])
            names_ids = [MIDDLE.encode(f" {name}(")[1:] for name in names]  # [1:]: the blank is a token of its own
            turn_weights = [1.0] + key_token_weights(piece[1:], names_ids) + [1.0]  # E5
            new_targets, new_weights = piece + [EOS], [weight / sum(turn_weights) for weight in turn_weights]  # E6
        ids, targets, weights = ids + piece, targets + new_targets, weights + new_weights
    n_left = len(ids) - len(targets)
    return ids, targets + [EOS] * n_left, weights + [0.0] * n_left


# 4. Supervised fine-tuning --------------------------------------------------------------------------------------------
def pad(rows, left=False):
    fills = [[0] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([fill + row if left else row + fill for row, fill in zip(rows, fills)])


def step(optimizer, loss):
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step(), optimizer.zero_grad()


def train_sft(model, rows, batch_size=4, learning_rate=4e-4):
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(rows) // batch_size)
    for start in range(0, len(rows), batch_size):
        ids_BT, targets_BT, weights_BT = map(pad, zip(*rows[start : start + batch_size]))
        losses_BT = F.cross_entropy(model(ids_BT, ids_BT > 0)[0].transpose(1, 2), targets_BT, reduction="none")
        loss = (weights_BT * losses_BT).sum() / weights_BT.sum()  # E1, E6
        step(optimizer, loss), schedule.step()


# 5. Sampling and the reward -------------------------------------------------------------------------------------------
@torch.no_grad()
def generate(model, prompts, greedy, max_tokens=40):
    """One response per prompt at temperature 1 or greedily, with its EOS where it came."""
    ids_BT, caches, responses = pad(prompts, left=True), [[] for _ in model.layers], [[] for _ in prompts]
    is_real_BL = ids_BT > 0
    while any(EOS not in r for r in responses) and len(responses[0]) < max_tokens:
        logits_BV = model(ids_BT, is_real_BL, caches)[0][:, -1]
        ids_BT = logits_BV.argmax(1)[:, None] if greedy else logits_BV.softmax(1).multinomial(1)
        is_real_BL = F.pad(is_real_BL, (0, 1), value=True)
        responses = [response + [token] for response, [token] in zip(responses, ids_BT.tolist())]
    return [response[: response.index(EOS) + 1] if EOS in response else response for response in responses]


def parse_call(text):
    """(name, arguments) of a text that is exactly one call with keyword literals, else None."""
    words = {"true": True, "false": False, "null": None}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        pairs = [(keyword.arg, keyword.value) for keyword in call.keywords]
        arguments = {k: words[v.id] if isinstance(v, ast.Name) else ast.literal_eval(v) for k, v in pairs}
        return None if call.args or None in arguments or len(arguments) < len(pairs) else (call.func.id, arguments)
    except (SyntaxError, ValueError, KeyError, AttributeError):
        return None


def tool_call_reward(text, gold, tools):
    """R of one response against the gold (name, arguments) (E22)."""
    name, arguments = parse_call(text) or (None, {})
    if name not in (*IMPLICIT_TOOLS, *(tool["name"] for tool in tools)):
        return -2.0  # not exactly one call, or a tool that is not offered
    if name != gold[0]:
        return -1.5
    documented = set().union(*(tool["parameters"]["properties"] for tool in tools if tool["name"] == name))
    hallucinated, missing = arguments.keys() - documented, gold[1].keys() - arguments.keys()
    redundant = (arguments.keys() & documented) - gold[1].keys()
    if hallucinated or redundant or missing:
        return -0.8 * bool(hallucinated) - 0.5 * bool(redundant) - 0.5 * bool(missing)  # E23
    return 1.0 if all(json.dumps(arguments[key]) == json.dumps(value) for key, value in gold[1].items()) else -0.25


# 6. PPO ---------------------------------------------------------------------------------------------------------------
def compute_gae(rewards_BT, values_BT, mask_BT, gae_lambda=0.95):
    """Advantages and returns with gamma = 1 (E25). After the last response token the value is 0."""
    advantages_BT, next_value_B, next_advantage_B = torch.zeros_like(rewards_BT), 0.0, 0.0
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + next_value_B - values_BT[:, t]
        advantages_BT[:, t] = mask_BT[:, t] * (delta_B + gae_lambda * next_advantage_B)  # E25
        next_value_B, next_advantage_B = mask_BT[:, t] * values_BT[:, t], advantages_BT[:, t]
    return advantages_BT, (advantages_BT + values_BT) * mask_BT


def policy_loss(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip_range=0.2):
    ratio_BT = (logprobs_BT - old_logprobs_BT).exp()
    terms_BT = torch.minimum(advantages_BT * ratio_BT, advantages_BT * ratio_BT.clamp(1 - clip_range, 1 + clip_range))
    return -terms_BT[mask_BT].mean()  # E29


def value_loss(values_BT, old_values_BT, returns_BT, mask_BT, clip_range=0.2):
    clipped_BT = values_BT.clamp(old_values_BT - clip_range, old_values_BT + clip_range)
    return 0.5 * torch.maximum((values_BT - returns_BT) ** 2, (clipped_BT - returns_BT) ** 2)[mask_BT].mean()  # E30


def train_ppo(policy, prompts, n_iterations, batch_size=24, kl_coef=0.2, critic_only=2):  # prompts: (ids, gold, tools)
    reference, critic, head = copy.deepcopy(policy), copy.deepcopy(policy), nn.Linear(policy.config["hidden_size"], 1)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=2e-4)
    value_optimizer = torch.optim.Adam([*critic.parameters(), *head.parameters()], lr=5e-4)
    nn.init.zeros_(head.weight)
    mean_rewards = []
    for iteration in range(n_iterations):
        batch = random.sample(prompts, batch_size)  # 6.1 sample and judge
        responses = generate(policy, [prompt for prompt, _, _ in batch], greedy=False)
        texts = [START.decode(r) if EOS in r else "" for r in responses]  # a response that never ends gets -2
        scores = [tool_call_reward(text, gold, tools) for text, (_, gold, tools) in zip(texts, batch)]
        mean_rewards.append(round(sum(scores) / batch_size, 2))
        # Position t has read ids[: t + 1] and predicts ids[t + 1]; the mask is True where that is a response token.
        ids_BT = pad([prompt + response for (prompt, _, _), response in zip(batch, responses)])
        mask_BT = pad([[0] * (len(p) - 1) + [1] * len(r) + [0] for (p, _, _), r in zip(batch, responses)]).bool()

        def measure(model):
            logits_BTV, hidden_BTD = model(ids_BT, ids_BT > 0)
            return -F.cross_entropy(logits_BTV.mT, ids_BT.roll(-1, 1), reduction="none"), head(hidden_BTD)[:, :, 0]

        (logprobs_BT, _), (_, values_BT) = measure(policy), measure(critic)  # 6.2 measure and credit
        with torch.no_grad():
            ref_logprobs_BT, _ = measure(reference)
            score_BT = (mask_BT & ~mask_BT.roll(-1, 1)) * torch.tensor(scores)[:, None]  # on the last response token
            rewards_BT = (score_BT - kl_coef * (logprobs_BT - ref_logprobs_BT)) * mask_BT  # E24
            advantages_BT, returns_BT = compute_gae(rewards_BT, values_BT, mask_BT)
        step(value_optimizer, value_loss(values_BT, values_BT.detach(), returns_BT, mask_BT))  # 6.3 one update: ratio 1
        if iteration >= critic_only:  # a policy that followed a critic of zeros would unlearn
            step(policy_optimizer, policy_loss(logprobs_BT, logprobs_BT.detach(), advantages_BT, mask_BT))
    return mean_rewards


# 7. All stages on the bundled data ------------------------------------------------------------------------------------
def which_are_right(model, held_out):
    outputs = generate(model, [prompt for prompt, _, _ in held_out], greedy=True)
    return [tool_call_reward(START.decode(o), gold, tools) == 1.0 for o, (_, gold, tools) in zip(outputs, held_out)]


def main():
    torch.manual_seed(0), random.seed(0), torch.set_num_threads(1)
    records = sorted(json.loads((DATA_DIR / "train.json").read_text()), key=lambda record: len(str(record)))
    trajectories = [read_trajectory(record) for record in records[:500]]  # the shortest, for the sake of the minute
    prompts = [(encode_prompt(t, m[:1]), m[1][1:], t) for t, m in trajectories if not is_erroneous(t, m, 1)]
    held_out = []
    for record in map(json.loads, (DATA_DIR / "test_seen.jsonl").read_text().splitlines()[:150]):
        tools, call = [tool["function"] for tool in record["tools"]], record["gold"][0]["calls"][0]
        prompt = encode_prompt(tools, [("user", record["messages"][0]["content"])])
        held_out.append((prompt, (call["name"], call["arguments"]), tools))
    model = LLaMA(MODEL_DIR)
    print(f"base  {sum(which_are_right(model, held_out))} of {len(held_out)} held-out calls right")
    train_sft(model, [encode_trajectory(*trajectory) for trajectory in random.sample(trajectories, 100)])
    after_sft = which_are_right(model, held_out)
    print(f"SFT   {sum(after_sft)}")
    rewards = train_ppo(model, prompts, n_iterations=9)
    pairs = list(zip(after_sft, which_are_right(model, held_out)))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    print(f"PPO   {sum(after_sft) + gained - lost}: {gained} gained, {lost} lost; rewards {rewards}")


if __name__ == "__main__":
    main()
