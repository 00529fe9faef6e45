"""The nouns shared by brain, muscle and adapters: plain values and ports. No torch, sockets, threads, clocks."""
