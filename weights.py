import torch, os
from safetensors.torch import save_file, load_file
def save_training(file, module, averaged, optimizer, step):
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()} | {f"averaged.{k}": v for k, v in averaged.state_dict().items()}
    for i, s in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in s.items()}
    tensors["step"] = torch.tensor(step)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    save_file({k:v.contiguous() for k,v in tensors.items()}, str(file)+".tmp"); os.replace(str(file)+".tmp", file)
def load_training(file, module, averaged, optimizer):
    t = load_file(file)
    module.load_state_dict({k[7:]: v for k, v in t.items() if k.startswith("module.")})
    averaged.load_state_dict({k[9:]: v for k, v in t.items() if k.startswith("averaged.")})
    state = {}
    for k, v in t.items():
        if k.startswith("optimizer."):
            _, i, name = k.split("."); state.setdefault(int(i), {})[name] = v
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(t["step"])
