"""The production profile: PostgreSQL behind Dagster and MLflow, S3-protocol storage for artifacts.

REALM_PROFILE=production chooses it; REALM_POSTGRES and REALM_S3 say where. Without it everything is SQLite and files in the home.
"""

import os
from dataclasses import dataclass

from realm_core.artifacts.mirror import ADDRESS, PROFILE
from realm_core.artifacts.store import Store
from realm_core.errors import ConfigError, RealmError

SERVER = "REALM_POSTGRES"
MLFLOW_DATABASE = "realm_mlflow"  # shared: runs and models of a home carry its identity


@dataclass(frozen=True)
class Production:
    """Where the services keep their state. Addresses hold passwords: they go into environments, never into files or logs."""

    server: str  # postgresql+psycopg2://USER:PASSWORD@HOST:PORT
    bucket: str  # s3://BUCKET/PREFIX

    def mlflow_uri(self) -> str:
        return f"{self.server}/{MLFLOW_DATABASE}"

    def mlflow_artifacts(self) -> str:
        return f"{self.bucket}/mlflow"

    def dagster_uri(self, store: Store) -> str:
        """Every home is a Dagster instance of its own: two daemons on one database would start each other's runs."""
        return f"{self.server}/{dagster_database(store)}"


def dagster_database(store: Store) -> str:
    return f"realm_dagster_{store.identity[:12]}"


def chosen() -> Production | None:
    """The production profile if the environment chooses it. Raises ConfigError if it does and leaves something open."""
    profile = os.environ.get(PROFILE) or "local"
    if profile == "local":
        return None
    if profile != "production":
        raise ConfigError(f"{PROFILE}={profile}: unknown; leave it unset or local, or set production")
    server, bucket = (os.environ.get(name, "").strip().rstrip("/") for name in (SERVER, ADDRESS))
    if not bucket.startswith("s3://"):
        raise ConfigError(f"{PROFILE}=production needs {ADDRESS}=s3://BUCKET/PREFIX (found {bucket!r})")
    scheme, _, rest = server.partition("://")
    if scheme not in ("postgresql", "postgres", "postgresql+psycopg2") or not rest or "/" in rest:
        raise ConfigError(
            f"{PROFILE}=production needs {SERVER}=postgresql://USER:PASSWORD@HOST:PORT, without a database"
        )
    # SQLAlchemy 2.1 takes the bare name for psycopg 3, which dagster-postgres does not know.
    return Production(f"postgresql+psycopg2://{rest}", bucket)


def create_databases(production: Production, store: Store) -> None:
    """Create the databases of MLflow and of this home's Dagster where they are missing.

    Raises RealmError if the server cannot be reached, or does not let us create what somebody has not created before.
    """
    try:
        import psycopg2  # noqa: F401
        import sqlalchemy as sa
    except ImportError:
        raise ConfigError(f"{PROFILE}=production needs PostgreSQL's driver; install the extra postgres") from None
    engine = sa.create_engine(f"{production.server}/postgres", isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            for name in (MLFLOW_DATABASE, dagster_database(store)):
                if not connection.execute(sa.text("select 1 from pg_database where datname = :n"), {"n": name}).first():
                    try:
                        connection.execute(sa.text(f'create database "{name}"'))
                    except sa.exc.IntegrityError:  # another process was quicker
                        continue
                    except sa.exc.ProgrammingError as error:
                        if "already exists" not in str(error.orig):
                            raise
    except sa.exc.SQLAlchemyError as error:
        reason = " ".join(str(getattr(error, "orig", error)).split())
        where = engine.url.render_as_string(hide_password=True)
        raise RealmError(f"{SERVER}: {where}: {reason}; start the server, or mend {SERVER}") from None
    finally:
        engine.dispose()
