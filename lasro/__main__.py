"`python -m lasro` is the command `lasro`."
from .command import main

main()
