-- What users, other servers and dashboards rely on: names, arguments, columns, settings, rights.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();

/* Functions: arguments with their defaults, and results. */

CREATE TABLE contract_function (name text, arguments text, result text);
INSERT INTO contract_function VALUES
	('register_branch', 'branch_id text, name text, central_url text DEFAULT NULL::text, active boolean DEFAULT true, receipts text DEFAULT ''required''::text', 'void'),
	('attach', '"table" regclass, entity_type text, key text[] DEFAULT NULL::text[], branch_column name DEFAULT NULL::name, priority text DEFAULT NULL::text, require_reason boolean DEFAULT true, reason_column name DEFAULT NULL::name, folio_column name DEFAULT NULL::name, amount_column name DEFAULT NULL::name, initial text DEFAULT ''none''::text, branch_fallback_column name DEFAULT NULL::name, date_column name DEFAULT NULL::name, sku_column name DEFAULT NULL::name, quantity_column name DEFAULT NULL::name', 'void'),
	('detach', '"table" regclass', 'void'),
	('attach_softmobile', 'schema name DEFAULT ''public''::name, initial text DEFAULT ''none''::text', NULL),
	('set_reason', 'reason text', 'void'),
	('current_reason', '', 'text'),
	('sync_run', 'branch text DEFAULT NULL::text, timeout interval DEFAULT ''00:01:00''::interval', 'SETOF softmobile.sync_history'),
	('requeue_failed_outbox_entries', 'branch text DEFAULT NULL::text, min_age interval DEFAULT NULL::interval', 'bigint'),
	('sync_outbox_retry', 'ids uuid[], reason text DEFAULT NULL::text', 'SETOF softmobile.sync_outbox'),
	('resend', 'branch text, lane text, seqs int8multirange, reason text, epoch uuid DEFAULT NULL::uuid', 'bigint'),
	('resolve_conflict', 'id uuid, resolution text, reason text', 'softmobile.conflict_resolution'),
	('prepare_offline', 'branch text, resources text[] DEFAULT NULL::text[], timeout interval DEFAULT ''00:01:00''::interval', 'TABLE(step text, ok boolean, detail text, hint text)'),
	('confirm_printer', 'branch text, printer text', 'softmobile.printer_confirmation'),
	('forget_printer', 'branch text, printer text', 'void'),
	('record_backup', 'kind text, finished_at timestamp with time zone DEFAULT clock_timestamp(), place text DEFAULT NULL::text', 'softmobile.backup_record'),
	('offline_checklist', 'branch text, days integer DEFAULT 7', 'TABLE(item text, ok boolean, detail text, hint text, code text, line integer)'),
	('reconcile', 'branch text, "from" date, "to" date', 'SETOF softmobile.sync_discrepancy'),
	('resolve_discrepancy', 'id bigint, reason text DEFAULT NULL::text', 'SETOF softmobile.sync_discrepancy'),
	('verify_delivery', 'branch text', NULL),
	('sync_explain', 'folio text, branch text DEFAULT NULL::text', 'text'),
	('metrics', '', 'text'),
	('grant_role', 'role name, kind text', 'void');
SELECT CASE WHEN p.oid IS NULL THEN skip(f.name || '() is not built yet', 2) ELSE
	is(left(pg_get_function_arguments(p.oid), length(f.arguments)), f.arguments, f.name || '(): arguments')
	|| E'\n' || CASE WHEN f.result IS NULL THEN pass(f.name || '() returns ' || pg_get_function_result(p.oid)) ELSE is(pg_get_function_result(p.oid), f.result, f.name || '() returns') END END
FROM contract_function f LEFT JOIN pg_proc p ON p.proname = f.name AND p.pronamespace = 'softmobile'::regnamespace
ORDER BY f.name;
SELECT is_empty($$SELECT proname FROM pg_proc WHERE pronamespace = 'softmobile'::regnamespace GROUP BY 1 HAVING count(*) > 1$$, 'one function for each name: named arguments and GRANT stay unambiguous');

/* Views: columns, in order; others may follow. */

CREATE TABLE contract_view (name text, columns text);
INSERT INTO contract_view VALUES
	('sync_outbox', 'id uuid, branch_id text, entity_type text, entity_id text, operation text, payload json, reason text, actor text, status text, priority text, attempt_count integer, last_attempt_at timestamp with time zone, error_message text, conflict_flag boolean, created_at timestamp with time zone, updated_at timestamp with time zone'),
	('sync_outbox_stats', 'branch_id text, entity_type text, priority text, total bigint, pending bigint, failed bigint, conflicts bigint, latest_update timestamp with time zone, oldest_pending timestamp with time zone, last_conflict_at timestamp with time zone'),
	('sync_history', 'id bigint, branch_id text, mode text, status text, started_at timestamp with time zone, finished_at timestamp with time zone, triggered_by text, error_message text, processed_events bigint, differences_detected bigint'),
	('sync_overview', 'branch_id text, link_state text, since timestamp with time zone, percent numeric, pending bigint, failed bigint, conflicts bigint, oldest_pending_age interval, pending_amount numeric, events_per_minute numeric, success_rate numeric, estimated_completion timestamp with time zone'),
	('sync_conflicts', 'id uuid, branch_id text, entity_type text, entity_id text, operation text, field text, old_value text, local_value text, central_value text, folio text, reason text, actor text, detail text, created_at timestamp with time zone, detected_at timestamp with time zone'),
	('sync_discrepancy', 'id bigint, branch_id text, kind text, entity_type text, entity_id text, folio text, sku text, local jsonb, central jsonb, detail text, detected_at timestamp with time zone, session_id bigint, status text, resolved_at timestamp with time zone, resolved_by text, reason text'),
	('folio_control', NULL), ('sync_audit', NULL);
SELECT CASE WHEN c.oid IS NULL THEN skip('view ' || v.name || ' is not built yet') WHEN v.columns IS NULL THEN pass('view ' || v.name) ELSE
	is((SELECT left(string_agg(a.attname || ' ' || format_type(a.atttypid, NULL), ', ' ORDER BY a.attnum), length(v.columns)) FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0),
		v.columns, 'columns of ' || v.name) END
FROM contract_view v LEFT JOIN pg_class c ON c.relname = v.name AND c.relnamespace = 'softmobile'::regnamespace
ORDER BY v.name;

/* Settings: defaults and contexts. */

CREATE TABLE contract_setting (name text, value text, context text);
INSERT INTO contract_setting VALUES
	('central_url', '', 'superuser'), ('branch_id', '', 'superuser'), ('reason', '', 'user'), ('auth_token_file', '', 'superuser'),
	('ca_file', '', 'sighup'), ('client_cert_file', '', 'sighup'), ('client_key_file', '', 'sighup'), ('signing_key_file', '', 'sighup'), ('central_networks', '', 'sighup'),
	('sync_interval', '30min', 'sighup'), ('retry_interval', '10min', 'sighup'), ('probe_interval', '15s', 'sighup'), ('unknown_branch', 'register', 'sighup'), ('max_attempts', '5', 'sighup'),
	('batch_max_events', NULL, 'sighup'), ('batch_max_bytes', NULL, 'sighup'), ('compression', 'gzip', 'sighup'), ('connect_timeout', '5s', 'sighup'), ('request_timeout', '30s', 'sighup'),
	('worker_role', '', 'sighup'), ('retention', '30d', 'sighup'),
	('central_backup_window', '14d', 'sighup'), ('reference_max_size', '64MB', 'sighup'),
	('drop_undelivered', 'off', 'superuser'),
	('enable_hybrid_prep', 'on', 'superuser'), ('enable_purchases_sales', 'on', 'superuser'), ('enable_transfers', 'on', 'superuser');
SELECT is((SELECT context FROM pg_settings s WHERE s.name = 'softmobile.' || c.name), c.context, format('softmobile.%s: who sets it', c.name))
FROM contract_setting c ORDER BY name;
SELECT is(CASE WHEN s.unit IS NULL THEN s.boot_val ELSE current_setting(s.name) END, c.value, format('softmobile.%s: default', c.name))
FROM contract_setting c JOIN pg_settings s ON s.name = 'softmobile.' || c.name WHERE c.value IS NOT NULL ORDER BY c.name;
SELECT set_eq($$SELECT substr(name, 12) FROM pg_settings WHERE name LIKE 'softmobile.%'$$, 'SELECT name FROM contract_setting', 'no other setting');
SELECT is_empty($$SELECT name FROM pg_settings WHERE name LIKE 'softmobile.%' AND vartype = 'integer' AND boot_val::numeric NOT BETWEEN min_val::numeric AND max_val::numeric$$,
	'defaults lie within their bounds');
SELECT is_empty($$SELECT name FROM pg_settings WHERE name LIKE 'softmobile.%' AND coalesce(short_desc, '') !~ '^[A-Z].*\.$'$$, 'every setting says what it is');

/* Words. */

SET LOCAL softmobile.reason = 'contract test';
SET LOCAL softmobile.branch_id = 'S1';
SELECT lives_ok($$SELECT softmobile.register_branch('S1', 'Centro')$$, 'register_branch() with two arguments');
CREATE TABLE sale (id integer PRIMARY KEY);
SELECT lives_ok($$SELECT softmobile.attach('sale', 'sale')$$, 'attach() with two');
INSERT INTO sale VALUES (1);
UPDATE sale SET id = 1;
DELETE FROM sale;
SELECT results_eq('SELECT operation, status, priority, attempt_count FROM softmobile.sync_outbox ORDER BY created_at',
	$$VALUES ('insert', 'PENDING', 'HIGH', 0), ('update', 'PENDING', 'HIGH', 0), ('delete', 'PENDING', 'HIGH', 0)$$, 'operations and status');
SET LOCAL softmobile.reason = '';
SELECT throws_ok('INSERT INTO sale VALUES (2)', '23514', 'X-Reason required: at least 5 characters', 'a missing reason');

/* Every object is described. */

SELECT is_empty($$SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'softmobile'::regnamespace AND c.relkind IN ('r', 'v', 'm', 'p', 'f') AND obj_description(c.oid, 'pg_class') IS NULL$$, 'tables and views have comments');
SELECT is_empty($$SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'softmobile'::regnamespace AND obj_description(p.oid, 'pg_proc') IS NULL$$, 'functions have comments');
SELECT is_empty($$SELECT t.evtname FROM pg_event_trigger t JOIN pg_depend d ON d.objid = t.oid AND d.deptype = 'e' WHERE obj_description(t.oid, 'pg_event_trigger') IS NULL$$, 'event triggers have comments');
SELECT is_empty($$SELECT t.typname FROM pg_type t WHERE t.typnamespace = 'softmobile'::regnamespace AND t.typtype IN ('e', 'd', 'r') AND obj_description(t.oid, 'pg_type') IS NULL$$, 'types have comments');
SELECT isnt(obj_description('softmobile'::regnamespace, 'pg_namespace'), NULL, 'the schema has a comment');

/* Safety. */

SELECT set_eq($$SELECT p.proname::text FROM pg_proc p WHERE p.pronamespace = 'softmobile'::regnamespace AND EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE a.grantee = 0)$$,
	'{set_reason, current_reason}'::text[], 'PUBLIC may set its reason and read it, and nothing else');
SELECT is_empty($$SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'softmobile'::regnamespace AND EXISTS (SELECT FROM aclexplode(coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))) a WHERE a.grantee = 0)$$,
	'PUBLIC reads and writes no table');
SELECT is_empty($$SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'softmobile'::regnamespace AND p.prosecdef AND NOT coalesce(p.proconfig, '{}') @> '{"search_path=pg_catalog, pg_temp"}'$$,
	'every SECURITY DEFINER function has a fixed search_path');
SELECT is_empty($$SELECT p.oid::regprocedure FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang WHERE p.pronamespace = 'softmobile'::regnamespace AND l.lanname IN ('plpgsql', 'sql') AND p.prosqlbody IS NULL AND NOT coalesce(p.proconfig, '{}') @> '{"search_path=pg_catalog, pg_temp"}'$$,
	'so has every function whose body is looked up when it runs');
SELECT is_empty($$SELECT t.tgrelid::regclass, t.tgname FROM pg_trigger t WHERE t.tgrelid::regclass::text LIKE 'softmobile.outbox\_event%' AND NOT t.tgisinternal AND t.tgenabled <> 'A'$$, 'what keeps the log is ENABLE ALWAYS');
SELECT is((SELECT count(*) FROM pg_trigger t WHERE t.tgrelid::regclass::text ~ '^softmobile\.outbox_event(_[1-4])?$' AND NOT t.tgisinternal), 10::bigint, 'on the log and all its segments');
SELECT is_empty($$SELECT c.oid::regclass FROM pg_class c WHERE c.relnamespace = 'softmobile'::regnamespace AND c.relkind = 'r' AND c.relname NOT IN ('outbox_event', 'outbox_identity', 'outbox_tile', 'outbox_trash', 'link_state', 'outbox_verification')
	AND c.oid <> ALL ((SELECT extconfig FROM pg_extension WHERE extname = 'softmobile')::oid[])$$, 'a dump carries every table but the identity and what the worker finds out again');
SELECT is_empty($$SELECT c.oid::regclass FROM pg_class c JOIN pg_depend e ON e.objid = c.oid AND e.classid = 'pg_class'::regclass AND e.deptype = 'e' WHERE c.relnamespace = 'softmobile'::regnamespace AND c.relkind = 'S'
	AND c.relname !~ 'lane(_id|_\d+)_seq$' AND c.oid <> ALL ((SELECT extconfig FROM pg_extension WHERE extname = 'softmobile')::oid[])$$, 'and every sequence but those of lanes, which begin anew');

SELECT * FROM finish();
ROLLBACK;
