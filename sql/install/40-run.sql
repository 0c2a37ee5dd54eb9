/*
 * Runs and the worker.
 *
 * poke_launcher() is called at the end of this part and takes effect when CREATE
 * EXTENSION commits: the launcher cannot see by itself which database has the
 * extension.
 */

CREATE FUNCTION softmobile.sync_run(branch text DEFAULT NULL, timeout interval DEFAULT '60 s')
RETURNS SETOF softmobile.sync_history
LANGUAGE c VOLATILE SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'softmobile_sync_run';
REVOKE ALL ON FUNCTION softmobile.sync_run(text, interval) FROM PUBLIC;
COMMENT ON FUNCTION softmobile.sync_run(text, interval) IS
'Sends what waits for a branch (NULL: for every active branch) and returns when that run is over, one session row per branch. After timeout the row says running, and the run goes on; its id is NULL if the worker has not begun it. The reason in force goes with it. Calls for one branch share a run that has not begun. Errors: 22023 timeout not positive; 25006 on a standby; 25001 in a transaction that is not READ COMMITTED or has captured events itself; 42704 unknown branch; 55000 branch not active, library not preloaded, no worker running, or the worker ended meanwhile; 53400 too many runs requested.';

CREATE FUNCTION softmobile.worker_status(OUT running boolean, OUT pid integer, OUT started_at timestamptz, OUT detail text)
LANGUAGE c VOLATILE
SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'softmobile_worker_status';
REVOKE ALL ON FUNCTION softmobile.worker_status() FROM PUBLIC;
COMMENT ON FUNCTION softmobile.worker_status() IS
'Whether this database''s worker is running, its process id, since when it is; detail says why it is not running.';

CREATE FUNCTION softmobile.poke_launcher() RETURNS void
LANGUAGE c VOLATILE
SET search_path = pg_catalog, pg_temp
AS 'MODULE_PATHNAME', 'softmobile_poke_launcher';
REVOKE ALL ON FUNCTION softmobile.poke_launcher() FROM PUBLIC;
COMMENT ON FUNCTION softmobile.poke_launcher() IS
'Has the launcher look, when the transaction commits, whether this database needs a worker. For install and update scripts.';
SELECT softmobile.poke_launcher();
