/*
 * A shop for the bench: what sells (venta, existencia), and what a backlog is loaded into (carga), so that the tables
 * that sell are as large with a backlog as without. Variables: receipts, url, branches.
 */
CREATE TABLE venta (id bigserial PRIMARY KEY, folio text NOT NULL, sucursal text NOT NULL, terminal integer NOT NULL, cliente integer,
	total numeric(12,2) NOT NULL, impuesto numeric(12,2), forma text, nota text, fecha timestamptz NOT NULL DEFAULT now());
CREATE TABLE existencia (sku integer PRIMARY KEY, sucursal text NOT NULL, cantidad integer NOT NULL, actualizado timestamptz NOT NULL) WITH (fillfactor = 50);
INSERT INTO existencia SELECT i, 's1', 1000000, now() FROM generate_series(1, 1000) AS i;
CREATE TABLE carga (LIKE venta INCLUDING ALL);
CREATE SEQUENCE carga_id OWNED BY carga.id;
ALTER TABLE carga ALTER id SET DEFAULT nextval('carga_id');

CREATE EXTENSION IF NOT EXISTS softmobile;
SELECT softmobile.register_branch('s' || i, 's' || i, central_url => :'url', receipts => :'receipts') FROM generate_series(1, :branches) AS i;
SELECT softmobile.attach('venta', 'sale', branch_column => 'sucursal', folio_column => 'folio', amount_column => 'total');
SELECT softmobile.attach('carga', 'sale', branch_column => 'sucursal', folio_column => 'folio', amount_column => 'total');
SELECT softmobile.attach('existencia', 'stock', branch_column => 'sucursal');

CREATE PROCEDURE load(events bigint) LANGUAGE plpgsql AS $$
BEGIN
	FOR first_one IN 1..events BY 50000 LOOP
		PERFORM softmobile.set_reason('Venta de mostrador');
		INSERT INTO carga (folio, sucursal, terminal, cliente, total, impuesto, forma, nota, fecha)
		SELECT 'F-' || lpad(i::text, 8, '0'), 's1', i % 8, (random() * 1000)::integer, s.total, round(s.total * 0.16, 2),
			CASE WHEN random() < 0.7 THEN 'efectivo' ELSE 'tarjeta' END, 'venta de mostrador', timestamptz '2026-01-01' + i * interval '1 minute'
		FROM (SELECT i, round((random() * 1000)::numeric, 2) AS total FROM generate_series(first_one, least(first_one + 49999, events)) AS i) AS s;
		COMMIT;
	END LOOP;
END
$$;
