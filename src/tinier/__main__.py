"""`python -m tinier`, which is how torchrun starts the program: torchrun -m tinier quantize …"""

from tinier.cli.main import main

main()
