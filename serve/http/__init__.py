"""The HTTP server's routes and rules over any :class:`serve.client.EngineClient`. Needs ``moeyard[serve]``."""
