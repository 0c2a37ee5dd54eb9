-- Who may do what: every function of the schema by name, every kind of role that grant_role() knows, and PUBLIC.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();
SET LOCAL search_path = public, pg_catalog;

CREATE ROLE rights_app;
CREATE ROLE rights_operator;
CREATE ROLE rights_auditor;
CREATE ROLE rights_worker;
CREATE ROLE rights_nobody;
SELECT softmobile.grant_role('rights_' || kind, kind) FROM unnest('{app, operator, auditor, worker}'::text[]) AS kind;

CREATE VIEW member AS
SELECT d.classid, d.objid FROM pg_depend d JOIN pg_extension e ON d.refobjid = e.oid
WHERE d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e' AND e.extname = 'softmobile';
CREATE VIEW routine AS
SELECT p.oid, p.oid::regprocedure::text AS signature, p.proname::text AS name, p.prosecdef AS definer, p.provolatile AS volatility, p.proconfig AS config, p.proowner AS owner,
	coalesce(obj_description(p.oid, 'pg_proc'), '') AS description, p.prorettype IN ('trigger'::regtype, 'event_trigger'::regtype) AS is_trigger,
	ARRAY(SELECT kind FROM unnest('{app, operator, auditor, worker, nobody}'::text[]) AS kind WHERE has_function_privilege('rights_' || kind, p.oid, 'EXECUTE')) AS users
FROM pg_proc p WHERE p.pronamespace = 'softmobile'::regnamespace;
-- One row for each thing that somebody but the owner may do; role NULL: PUBLIC; field: with this column only.
CREATE VIEW held AS
SELECT c.oid, c.relname::text AS name, l.field, c.relkind, a.privilege_type, a.is_grantable, CASE WHEN a.grantee <> 0 THEN pg_get_userbyid(a.grantee)::text END AS role
FROM pg_class c
	CROSS JOIN LATERAL (
		SELECT NULL::name AS field, c.relacl AS acl UNION ALL
		SELECT t.attname, t.attacl FROM pg_attribute t WHERE t.attrelid = c.oid AND t.attacl IS NOT NULL) AS l
	CROSS JOIN LATERAL aclexplode(coalesce(l.acl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))) AS a
WHERE c.relnamespace = 'softmobile'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND a.grantee <> c.relowner;

-- What a command as another role comes to: NULL, or the SQLSTATE and message of its failure. Nothing it did stays.
CREATE FUNCTION as_role(role text, command text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
	EXECUTE format('SET LOCAL ROLE %I', role);
	EXECUTE command;
	RAISE EXCEPTION USING ERRCODE = 'ZZ000', MESSAGE = 'undo';
EXCEPTION WHEN OTHERS THEN
	RETURN nullif(SQLSTATE, 'ZZ000') || ' ' || SQLERRM;
END
$$;

/* Functions. */

SELECT ok(NOT r.definer OR coalesce(r.config, '{}') @> '{"search_path=pg_catalog, pg_temp"}',
	format('%s: %s; for %s', r.signature, CASE WHEN r.definer THEN 'SECURITY DEFINER with a fixed search_path' ELSE 'SECURITY INVOKER' END,
		coalesce(nullif(array_to_string(r.users, ', '), ''), 'the owner alone')))
FROM routine r ORDER BY r.signature;
SELECT set_eq($$SELECT name FROM routine WHERE 'nobody' = ANY (users)$$, '{current_reason, set_reason}'::text[], 'PUBLIC may say and ask its reason, and call nothing else');
SELECT is_empty($$SELECT r.signature FROM routine r JOIN pg_proc p USING (oid) CROSS JOIN LATERAL aclexplode(p.proacl) AS a WHERE a.is_grantable AND a.grantee <> p.proowner$$,
	'nobody may pass the right to call on');
SELECT is_empty($$SELECT signature FROM routine WHERE is_trigger AND users <> '{}'$$, 'trigger functions are nobody''s to call');
SELECT is_empty($$SELECT signature FROM routine WHERE description ~ '^Internal' AND volatility = 'v' AND users && '{app, operator, auditor}'$$,
	'what is internal and may change something is called by the worker at most');
SELECT set_eq($$SELECT name FROM routine WHERE 'auditor' = ANY (users) AND volatility = 'v'$$, '{set_reason, verify_delivery, worker_status}'::text[],
	'an auditor calls what reads, and what compares');
SELECT set_eq($$SELECT name FROM routine WHERE 'app' = ANY (users) AND volatility = 'v'$$, 
	'{confirm_printer, offline_checklist, prepare_offline, reconcile, requeue_failed_outbox_entries, resolve_discrepancy, set_reason, sync_outbox_retry, sync_run, verify_delivery, worker_status}'::text[],
	'an application does what the operating procedure asks, and nothing else that changes something');
SELECT set_eq($$SELECT name FROM routine WHERE users = '{}' AND name IN ('attach', 'detach', 'attach_softmobile', 'grant_role', 'grant_central', 'central_create_token', 'central_revoke_token', 'central_set_reference')$$,
	'{attach, detach, attach_softmobile, grant_role, grant_central, central_create_token, central_revoke_token, central_set_reference}'::text[],
	'what sets a server up is the owner''s');
SELECT is_empty($$SELECT signature FROM routine WHERE name ~ '^central_' AND users <> '{}'$$, 'no kind of a branch''s role has a part in headquarters');

/* Tables, views, sequences. */

SELECT is_empty('SELECT name, privilege_type FROM held WHERE role IS NULL', 'PUBLIC reads and writes nothing');
SELECT is_empty('SELECT name, role FROM held WHERE is_grantable', 'nobody may pass a right on');
SELECT is_empty($$SELECT name, role, privilege_type FROM held WHERE role <> 'rights_worker' AND (privilege_type <> 'SELECT' OR relkind = 'S')$$,
	'app, operator and auditor read; they change tables through functions only');
SELECT is_empty($$SELECT name, privilege_type FROM held WHERE role = 'rights_worker' AND privilege_type NOT IN ('SELECT', 'INSERT', 'UPDATE', 'DELETE', 'USAGE')$$,
	'the worker truncates nothing and makes no triggers');
SELECT is_empty($$SELECT name, privilege_type FROM held WHERE role = 'rights_worker' AND name ~ '^outbox_event' AND privilege_type <> 'SELECT'$$,
	'the worker does not write to the log');
SELECT is_empty($$SELECT name, role FROM held WHERE name ~ '^central_'$$, 'no kind of a branch''s role reads what headquarters has, least of all tokens');
SELECT is_empty($$SELECT h.name, a.attname FROM held h JOIN pg_attribute a ON a.attrelid = h.oid AND a.attnum > 0
	WHERE h.role = 'rights_app' AND has_column_privilege('rights_app', h.oid, a.attnum, 'SELECT') AND h.name NOT IN ('reference_data', 'sync_discrepancy')
		AND (a.atttypid IN ('json'::regtype, 'jsonb'::regtype) OR a.attname IN ('local_value', 'central_value', 'old_value'))$$,
	'an application sees no payloads, but the reference data, and columns that reconcile() found to differ');
SELECT is_empty($$SELECT name FROM held WHERE role = 'rights_app' AND name ~ 'audit|exception|request|identity|session$'$$, 'nor who did what');

SELECT is(as_role(h.role, format('SELECT %s FROM softmobile.%I', coalesce(string_agg(quote_ident(h.field), ', '), '*'), h.name)), NULL,
	format('%s reads %s%s', h.role, h.name, CASE WHEN count(h.field) > 0 THEN ' in part' END))
FROM held h WHERE h.relkind <> 'S' AND h.privilege_type = 'SELECT' GROUP BY h.role, h.name ORDER BY h.role, h.name;
SELECT is(as_role('rights_' || kind, command), '42501 ' || message, format('%s: %s', kind, command))
FROM unnest('{app, operator, auditor, worker, nobody}'::text[]) AS kind
	CROSS JOIN (VALUES
		('CREATE TABLE softmobile.planted (i integer)', 'permission denied for schema softmobile'),
		('INSERT INTO softmobile.outbox_event_1 DEFAULT VALUES', 'permission denied for table outbox_event_1'),
		('DELETE FROM softmobile.outbox_event', 'permission denied for table outbox_event'),
		('UPDATE softmobile.branch SET central_url = NULL', 'permission denied for table branch'),
		('SELECT * FROM softmobile.central_token', 'permission denied for table central_token'),
		($$SELECT softmobile.grant_role('rights_nobody', 'operator')$$, 'permission denied for function grant_role'),
		('SET softmobile.drop_undelivered = on', 'permission denied to set parameter "softmobile.drop_undelivered"'),
		('SET softmobile.enable_purchases_sales = off', 'permission denied to set parameter "softmobile.enable_purchases_sales"'),
		($$SET softmobile.central_url = 'http://elsewhere.example'$$, 'permission denied to set parameter "softmobile.central_url"')) AS c (command, message);
SELECT is(as_role('rights_app', 'SELECT * FROM softmobile.sync_outbox'), '42501 permission denied for view sync_outbox', 'app: the queue with its payloads');
SELECT is(as_role('rights_app', $$SELECT softmobile.resend('b1', 'high', '{[1,2)}', 'because I can')$$), '42501 permission denied for function resend', 'app: sending again');
SELECT is(as_role('rights_auditor', $$SELECT softmobile.register_branch('9', 'mine')$$), '42501 permission denied for function register_branch', 'auditor: a branch');

-- A branch registered later has sequences; they are nobody's either.
SELECT softmobile.register_branch('rights', 'Rights');
SELECT is_empty($$SELECT name FROM held WHERE role IS DISTINCT FROM 'rights_worker' AND relkind = 'S'$$, 'sequences made later');

SELECT is(has_schema_privilege('rights_nobody', 'softmobile', 'USAGE'), true, 'everybody finds the schema');
SELECT is(softmobile.grant_role('rights_app', 'app')::text, '', 'grant_role() can be called again');
SELECT throws_ok($$SELECT softmobile.grant_role('rights_missing', 'app')$$, '42704', 'role "rights_missing" does not exist', 'grant_role() of no role');
SELECT throws_ok($$SELECT softmobile.grant_role('rights_app', 'king')$$, '22023', 'unknown kind of role "king"', 'grant_role() of no kind');

-- Objects that users plant where they may: their temporary schema.
SELECT is(as_role('rights_operator', $$
	CREATE TEMP TABLE branch (branch_id text, name text, active boolean);
	CREATE FUNCTION pg_temp.known_branch(text) RETURNS text LANGUAGE sql AS 'SELECT 1/0';
	CREATE FUNCTION pg_temp.btrim(text) RETURNS text LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $x$called as %$x$, current_user; END';
	CREATE FUNCTION pg_temp.trapped(text, text) RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $x$called as %$x$, current_user; END';
	CREATE OPERATOR pg_temp.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_temp.trapped);
	SET LOCAL search_path = pg_temp, pg_catalog;
	SELECT softmobile.register_branch('planted', 'Planted'), softmobile.requeue_failed_outbox_entries('planted'), softmobile.resend('planted', 'high', '{[1,2)}', 'is it called');
	SELECT count(*) FROM softmobile.sync_outbox;
	SELECT count(*) FROM softmobile.sync_overview;
	SELECT count(*) FROM softmobile.folio_control;
	SELECT softmobile.sync_explain('A-1'), softmobile.metrics()$$), NULL, 'functions and operators of the caller''s are not called');

/* Objects. */

SELECT is_empty($$SELECT c.oid::regclass FROM pg_class c JOIN member m ON m.classid = 'pg_class'::regclass AND m.objid = c.oid
	WHERE c.relkind <> 'S' AND obj_description(c.oid, 'pg_class') IS NULL AND c.relkind <> 'c'$$, 'every table and view has a comment');
SELECT is_empty($$SELECT signature FROM routine WHERE description = ''$$, 'every function has a comment');
SELECT is_empty($$SELECT t.oid::regtype FROM pg_type t JOIN member m ON m.classid = 'pg_type'::regclass AND m.objid = t.oid LEFT JOIN pg_class c ON c.oid = t.typrelid
	WHERE t.typelem = 0 AND coalesce(c.relkind, 'c') = 'c' AND obj_description(t.oid, 'pg_type') IS NULL$$, 'every type has a comment');
SELECT is_empty($$SELECT t.evtname FROM pg_event_trigger t JOIN member m ON m.classid = 'pg_event_trigger'::regclass AND m.objid = t.oid
	WHERE obj_description(t.oid, 'pg_event_trigger') IS NULL$$, 'every event trigger has a comment');
SELECT is_empty($$SELECT m.classid::regclass, m.objid FROM member m WHERE m.classid::regclass::text NOT IN ('pg_class', 'pg_proc', 'pg_type', 'pg_event_trigger')$$,
	'there are no objects of other kinds');
SELECT isnt(obj_description('softmobile'::regnamespace, 'pg_namespace'), NULL, 'so has the schema');
SELECT isnt(obj_description(oid, 'pg_extension'), NULL, 'and the extension') FROM pg_extension WHERE extname = 'softmobile';
SELECT is_empty($$SELECT r.signature FROM routine r JOIN pg_extension e ON e.extname = 'softmobile' WHERE r.owner <> e.extowner
	UNION ALL SELECT c.relname FROM pg_class c JOIN pg_extension e ON e.extname = 'softmobile' WHERE c.relnamespace = 'softmobile'::regnamespace AND c.relowner <> e.extowner$$,
	'all is owned by the extension''s owner');

SELECT * FROM finish();
ROLLBACK;
