# Runs once, at the first start of the cluster: a role for each service, which owns its own databases and no other.
for role in airflow mlflow drydock; do
    password=$(cat "/run/secrets/postgres-$role")
    psql --quiet --set=ON_ERROR_STOP=1 <<END
CREATE ROLE $role LOGIN PASSWORD '$password';
END
done
psql --quiet --set=ON_ERROR_STOP=1 <<END
CREATE DATABASE airflow OWNER airflow;
CREATE DATABASE drydock OWNER drydock;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_accounts OWNER mlflow;
REVOKE CONNECT ON DATABASE airflow, drydock, mlflow, mlflow_accounts FROM PUBLIC;
END
