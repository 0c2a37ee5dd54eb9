-- Code that somebody plants where a function of ours, which runs as a superuser, comes across it; events that nobody made; URLs.
\set ON_ERROR_STOP 1
BEGIN;
SELECT no_plan();

CREATE ROLE planted_owner;
CREATE ROLE planted_app;
CREATE ROLE planted_operator;
SELECT softmobile.grant_role('planted_owner', 'app'), softmobile.grant_role('planted_app', 'app'), softmobile.grant_role('planted_operator', 'operator');
CREATE SCHEMA shop AUTHORIZATION planted_owner;
GRANT USAGE ON SCHEMA shop TO planted_app;
SELECT softmobile.register_branch('S1', 'Centro');

SET LOCAL ROLE planted_owner;
CREATE TABLE shop.ventas (id integer PRIMARY KEY, store_id text);
CREATE TABLE shop.lines (id integer, day date NOT NULL, store_id text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE shop.lines_1 PARTITION OF shop.lines FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE TABLE shop.other (LIKE shop.ventas INCLUDING ALL);
RESET ROLE;
SELECT softmobile.attach('shop.ventas', 'sale', branch_column => 'store_id'), softmobile.attach('shop.lines', 'sale_line', branch_column => 'store_id');
SET LOCAL softmobile.reason = 'planted test';

-- What our functions read in a table, they read as its owner; test/t/061_security.pl has the rest.
SET LOCAL ROLE planted_owner;
CREATE VIEW shop.spy AS SELECT current_user::text AS name;
RESET ROLE;
SELECT results_eq($$SELECT * FROM softmobile.read_as_owner('shop.other', 'SELECT name FROM shop.spy') AS r (name text)$$, '{planted_owner}'::text[], 'a view in the place of a table is read as the table''s owner');
SELECT throws_ok($$SELECT * FROM softmobile.read_as_owner('shop.other', 'SELECT payload FROM softmobile.outbox_event') AS r (payload json)$$, '42501', 'permission denied for table outbox_event', 'who may not read events');
SELECT throws_ok($$SELECT * FROM softmobile.read_as_owner('shop.other', 'SELECT set_config(''role'', ''postgres'', false)') AS r (role text)$$, '42501', NULL, 'nor become somebody else');
SELECT throws_like($$SELECT * FROM softmobile.read_as_owner('shop.other', 'DELETE FROM shop.other RETURNING id') AS r (id integer)$$, '%not allowed in a non-volatile function%', 'nor does reading change anything');
SELECT lives_ok($$SELECT * FROM softmobile.read_as_owner('shop.other', 'SELECT set_config(''search_path'', ''shop'', false)') AS r (path text)$$, 'a setting');
SELECT isnt(current_setting('search_path'), 'shop', 'is as it was afterwards');

/* Events that nobody made. */

SET LOCAL ROLE planted_owner;
CREATE TRIGGER forge AFTER INSERT ON shop.other FOR EACH ROW EXECUTE FUNCTION softmobile.capture();
CREATE TRIGGER forge_as_child AFTER INSERT ON shop.other FOR EACH ROW EXECUTE FUNCTION softmobile.capture('inherited');
SELECT throws_ok($$INSERT INTO shop.other VALUES (1, 'S1')$$, '55000', 'table "other" is not attached to softmobile', 'a table that is not attached makes no events, whatever triggers it has');
CREATE TRIGGER twice AFTER INSERT ON shop.lines_1 FOR EACH ROW EXECUTE FUNCTION softmobile.capture();
RESET ROLE;
SELECT matches((SELECT detail FROM softmobile.offline_checklist('S1') WHERE code = 'triggers' AND NOT ok), 'shop.lines_1 has 2 triggers softmobile.capture\(\)', 'the checklist tells of a table that is captured twice');
SELECT throws_ok(format('SET LOCAL ROLE %I; %s', role, command), '42501', NULL, format('%s: %s', role, command))
FROM (VALUES ('planted_owner'), ('planted_app'), ('planted_operator')) AS r (role)
	CROSS JOIN (VALUES
		($$INSERT INTO softmobile.outbox_event_1 (seq, created_at, id, lane_id, entity_no, op, entity_id, actor, payload) VALUES (1, now(), gen_random_uuid(), 1, 1, 'i', '1', 'x', '{}')$$),
		($$UPDATE softmobile.outbox_event SET payload = '{}'$$), ('DELETE FROM softmobile.outbox_event'), ('TRUNCATE softmobile.outbox_event_1'),
		($$INSERT INTO softmobile.outbox_request (kind) VALUES ('resend')$$), ('UPDATE softmobile.outbox_lane SET settled = ''{}'''),
		($$SELECT softmobile.capture_existing('shop.other', 0, 1, 'somebody else', 'a reason')$$), ($$SELECT softmobile.open_epoch('mine')$$),
		($$SELECT softmobile.record_audit('retry', NULL, 'reason', 1, NULL, NULL, 'somebody else')$$), ($$SELECT softmobile.attach('shop.other', 'sale')$$),
		($$SELECT * FROM softmobile.read_as_owner('shop.ventas', 'SELECT 1') AS r (i integer)$$), ($$SELECT * FROM softmobile.ask('http://127.0.0.1/', 'GET', NULL, 1)$$),
		($$SELECT * FROM softmobile.ask_central('S1', 'POST', '/events', '[]')$$)) AS c (command);
SELECT throws_ok(format('SET LOCAL ROLE %I; SELECT payload FROM softmobile.%s', role, source), '42501', NULL, format('%s: payloads of %s', role, source))
FROM (VALUES ('planted_owner'), ('planted_app')) AS r (role)
	CROSS JOIN (VALUES ('sync_outbox'), ('outbox_event'), ('outbox_event_1'), ('outbox_event_4'), ('outbox_exception'), ('sync_outbox_page()')) AS s (source);
RESET ROLE;
SELECT throws_ok(format('SELECT setval(%L, 1)', s.oid::regclass), '42501', NULL, 'planted_owner sets no number back: ' || c.priority)
FROM (SELECT set_config('role', 'planted_owner', true)) AS r,
	softmobile.outbox_lane c JOIN pg_class s ON s.relname = 'lane_' || c.lane_id || '_seq' WHERE c.branch_id = 'S1' LIMIT 3;
RESET ROLE;

/* Where events go, and with them the token. */

SET LOCAL ROLE planted_operator;
SELECT lives_ok($$SELECT softmobile.register_branch('S2', 'Norte'), softmobile.register_branch('S2', 'Norte 2')$$, 'an operator registers branches');
SELECT throws_ok($$SELECT softmobile.register_branch('S2', 'Norte', 'https://elsewhere.example')$$, '42501', 'permission denied to change the central_url of branch "S2"', 'but does not say where their events go');
SELECT throws_ok($$SELECT softmobile.register_branch('S2', 'Norte', receipts => 'none')$$, '42501', 'permission denied to let branch "S2" do without receipts', 'nor that they need no receipts');
RESET ROLE;
SELECT softmobile.register_branch('S3', 'Sur', receipts => 'none');
SET LOCAL ROLE planted_operator;
SELECT lives_ok($$SELECT softmobile.register_branch('S3', 'Sur 2', receipts => 'none')$$, 'a branch that needs none is renamed');
SELECT lives_ok($$SELECT softmobile.register_branch('S3', 'Sur 2', receipts => 'required')$$, 'it may be made to need them');
SELECT throws_ok($$SELECT softmobile.register_branch('S3', 'Sur 2', receipts => 'none')$$, '42501', NULL, 'and no more not to');
RESET ROLE;
SELECT softmobile.register_branch('S2', 'Norte', 'https://central.example');
SET LOCAL ROLE planted_operator;
SELECT lives_ok($$SELECT softmobile.register_branch('S2', 'Norte 3', 'https://central.example')$$, 'where they go already, they may go');
SELECT throws_ok($$SELECT softmobile.register_branch('S2', 'Norte 3')$$, '42501', NULL, 'and are not brought back either');
RESET ROLE;
GRANT SET ON PARAMETER softmobile.central_url TO planted_operator;
SET LOCAL ROLE planted_operator;
SELECT lives_ok($$SELECT softmobile.register_branch('S2', 'Norte 3', 'https://elsewhere.example', receipts => 'none')$$, 'who was given the right to the setting may');
RESET ROLE;

SELECT * FROM finish();
ROLLBACK;
