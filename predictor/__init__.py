"""predictor: runs a workflow of ops for each request. The SDK is `predictor.client`."""

__all__: list[str] = []
