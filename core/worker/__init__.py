"""The worker: request table, input building, the model runner."""
