"""What every room needs, one responsibility a file.

``contracts``     argument checks, written as data
``device``        what the machine is: GPU model and limits, available toolchains
``dispatch``      which backend runs a call
``errors``        the exceptions that callers see
``once``          what a second derivative meets
``plans``         remembering what validation made of a call
``transforms``    what ``torch.func`` and forward-mode differentiation ask of a call
``scoped``        settings that contexts change, in whichever order they end
``registration``  operators as ``torch.library`` entries
"""
