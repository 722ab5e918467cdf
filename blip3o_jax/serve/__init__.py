"""An HTTP server of the images API of OpenAI, for one model (docs/serve.md)."""
