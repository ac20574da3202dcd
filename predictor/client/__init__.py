"""The SDK. It never loads torch.

with Client("127.0.0.1:8500") as client:
    answer = client.infer("ctr", {"dense": dense, "keys": keys, "lengths": lengths})
    scores = answer.outputs["prob"][:, 1]
"""

from predictor.client.inference import Answer, AsyncClient, Client
from predictor.tensors import Texts, texts

__all__ = ["Answer", "AsyncClient", "Client", "Texts", "texts"]
