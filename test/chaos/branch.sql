-- The branch of the campaign: tables as a shop has them, and beside the extension's capture a
-- second one, in plain SQL, which says what was really committed.  Each version of a row has a
-- stamp of its own, so a change is known by (entity_type, op, stamp) in both.
CREATE SEQUENCE ids;
CREATE SEQUENCE stamps;
CREATE SEQUENCE truth_numbers;

CREATE TABLE truth (
	n bigint PRIMARY KEY DEFAULT nextval('truth_numbers'),
	branch_id text NOT NULL,
	entity_type text NOT NULL,
	entity_id text NOT NULL,
	op text NOT NULL,
	stamp bigint NOT NULL,
	row jsonb NOT NULL
);

CREATE TABLE sale (id text PRIMARY KEY, branch text NOT NULL, amount numeric(12,2) NOT NULL, note text, stamp bigint NOT NULL);
CREATE TABLE line (id text PRIMARY KEY, sale_id text NOT NULL REFERENCES sale ON DELETE CASCADE ON UPDATE CASCADE, branch text NOT NULL, qty integer NOT NULL, stamp bigint NOT NULL);
CREATE INDEX ON line (sale_id);
CREATE TABLE stock (id text PRIMARY KEY, branch text NOT NULL, qty integer NOT NULL, stamp bigint NOT NULL);
CREATE TABLE customer (id text PRIMARY KEY, branch text NOT NULL, visits integer NOT NULL, note text, stamp bigint NOT NULL);
CREATE TABLE draft (id text PRIMARY KEY, branch text NOT NULL, note text, stamp bigint NOT NULL);
CREATE TABLE movement (id text PRIMARY KEY, branch text NOT NULL, qty integer NOT NULL, note text, stamp bigint NOT NULL) PARTITION BY HASH (id);
CREATE TABLE movement_0 PARTITION OF movement FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE movement_1 PARTITION OF movement FOR VALUES WITH (MODULUS 2, REMAINDER 1);

-- Attached while it is in use, with the rows that it has by then.
CREATE TABLE catalogue (id text PRIMARY KEY, branch text NOT NULL, price numeric(12,2) NOT NULL, note text);
INSERT INTO catalogue SELECT 'A' || i, 'b' || i % 3 + 1, i, repeat('x', 200) FROM generate_series(1, 3000) AS i;

CREATE FUNCTION set_stamp() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	NEW.stamp := nextval('stamps');
	RETURN NEW;
END
$$;

-- A change of key or branch is a delete of one entity and an insert of another.
CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	moved boolean := TG_OP = 'UPDATE' AND (OLD.id <> NEW.id OR OLD.branch <> NEW.branch);
BEGIN
	IF TG_OP = 'DELETE' OR moved THEN
		INSERT INTO truth (branch_id, entity_type, entity_id, op, stamp, row)
		VALUES (OLD.branch, TG_ARGV[0], OLD.id, 'delete', OLD.stamp, to_jsonb(OLD));
	END IF;
	IF TG_OP <> 'DELETE' THEN
		INSERT INTO truth (branch_id, entity_type, entity_id, op, stamp, row)
		VALUES (NEW.branch, TG_ARGV[0], NEW.id, CASE WHEN TG_OP = 'INSERT' OR moved THEN 'insert' ELSE 'update' END, NEW.stamp, to_jsonb(NEW));
	END IF;
	RETURN NULL;
END
$$;

DO $$
DECLARE
	t record;
BEGIN
	FOR t IN SELECT * FROM (VALUES ('sale', 'sale'), ('line', 'sale_line'), ('stock', 'inventory'), ('movement', 'inventory_movement'),
			('customer', 'customer'), ('draft', 'draft')) AS v (relation, entity_type) LOOP
		EXECUTE format('CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON %I FOR EACH ROW EXECUTE FUNCTION set_stamp()', t.relation);
		EXECUTE format('CREATE TRIGGER tell AFTER INSERT OR UPDATE OR DELETE ON %I FOR EACH ROW EXECUTE FUNCTION tell(%L)', t.relation, t.entity_type);
		PERFORM softmobile.attach(t.relation::regclass, t.entity_type, branch_column => 'branch');
	END LOOP;
END
$$;
SELECT softmobile.register_branch('b' || i, 'Branch ' || i) FROM generate_series(1, 3) AS i;

INSERT INTO stock SELECT 'K' || i, 'b' || i % 3 + 1, 1000, 0 FROM generate_series(1, 80) AS i;
INSERT INTO customer SELECT 'C' || i, 'b' || i % 3 + 1, 0, 'nuevo', 0 FROM generate_series(1, 60) AS i;
INSERT INTO draft SELECT 'D' || i, 'b' || i % 3 + 1, 'borrador', 0 FROM generate_series(1, 20) AS i;

-- Numbers are drawn at commit, unless the transaction looks at the log before: so a seller can make gaps.
CREATE FUNCTION draw_numbers() RETURNS void LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
	PERFORM FROM softmobile.outbox_event LIMIT 0;
END
$$;
