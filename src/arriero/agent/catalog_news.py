"""When is the catalog another one, so that whoever places work has to know?"""

from collections.abc import Callable

import msgspec

from arriero.agent.catalog import ModelCatalog
from arriero.contracts.errors import ArrieroError
from arriero.contracts.records import ModelRecord
from arriero.runtime import logs


class CatalogNews:
    """Reads the catalog anew whenever it changed; `publish` hears of it where that is news."""

    def __init__(self, catalog: ModelCatalog, publish: Callable[[list[ModelRecord]], None]) -> None:
        self._catalog = catalog
        self._publish = publish
        self._log = logs.get("arriero.agent.catalog")
        self._told: list[ModelRecord] | None = None
        #: The models as of the last look, as they were told.
        self.models: list[ModelRecord] = []

    async def look(self) -> None:
        """Read the catalog; tell it if it is another one.  That a model was used is no change."""
        models = await self._catalog.records()
        # Sorted: the catalog's own order is that of the last use.
        shown = sorted((_unused(model) for model in models), key=lambda model: model.model_ref)
        if shown != self._told:
            is_first, self._told = self._told is None, shown
            self.models = models
            if not is_first:
                self._publish(models)

    async def run(self) -> None:
        """Look after each change; ends only by being cancelled."""
        while True:
            version = self._catalog.version
            try:
                await self.look()
            except ArrieroError as error:
                # What was told last stays; the next change tells the rest.
                self._log.warning("catalog_not_read", code=str(error.code), reason=error.message)
            while self._catalog.version == version:
                await self._catalog.changed.wait()


def _unused(model: ModelRecord) -> ModelRecord:
    return msgspec.structs.replace(model, last_used_unix=0.0, times_used=0)
